"""Training on transformers' Trainer: a configuration in, a run folder with the adapter out."""
