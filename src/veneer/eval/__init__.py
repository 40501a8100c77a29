"""Measuring a trained run."""
