"""The registry of tasks: one line each. Nothing is imported until a task is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ...errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .base import Task

TASKS = {
    "text-classification": "classify.TextClassification",
    "multi-label-classification": "classify.MultiLabel",
    "regression": "classify.Regression",
    "token-classification": "tokens.TokenClassification",
    "causal-lm": "language.CausalLM",
    "masked-lm": "masked.MaskedLM",
    "chat": "language.Chat",
    "text-to-text": "language.TextToText",
    "dpo": "preference.Preference",
    "image-classification": "media.ImageClassification",
    "audio-classification": "media.AudioClassification",
    "sentence-embedding": "embedding.SentenceEmbedding",
    "choice": "choices.Choice",
    "text-to-choice": "choices.TextToChoice",
}


def find_task(name: str) -> type[Task]:
    """The task of that name. Raises: ConfigError with the nearest."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}", where="task", fix=did_you_mean(name, TASKS))
    module, _, cls = TASKS[name].partition(".")
    return getattr(importlib.import_module(f".{module}", __name__), cls)
