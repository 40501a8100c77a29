"""A small model and a task that it can learn: which half of the vocabulary the first token is from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

# factors over the default rates, which are for long runs
PLANS = [{"method": "lora", "r": 2}, {"method": "ia3"}, {"method": "bottleneck", "size": 4}, {"method": "prefix", "length": 3}]
SPACE = {"plans": PLANS, "rates": [30]}


def model(classes: int = 2) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
    return BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=32, num_labels=classes, initializer_range=0.1)).eval()


def rows(n: int, seed: int = 1, classes: int = 2) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 17, (n, 6), generator=g)
    labels = (ids[:, 0] - 5) * classes // 12
    return [{"input_ids": i, "attention_mask": torch.ones(6, dtype=torch.long), "labels": y} for i, y in zip(ids, labels, strict=True)]


def data() -> tuple[Any, Any]:
    return rows(96), rows(100, seed=2)


FAST: dict[str, Any] = {"steps": 60, "batch_size": 8}
