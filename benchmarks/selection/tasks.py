"""The tasks that prepare.py wrote, the base, and how answers are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS = ("rotten", "plot", "r8", "news", "tweets", "amazon", "spam")


def data_of(folder: Path, task: str, longest: int | None = None) -> dict[str, Any]:
    """pool, dev and test of a task as dicts of tensors, and the number of classes."""
    import torch
    from safetensors.torch import load_file

    found = load_file(folder / f"{task}.safetensors")
    out: dict[str, Any] = {"classes": len(json.loads((folder / "tasks.json").read_text())[task]["labels"])}
    for part in ("pool", "dev", "test"):
        ids, length = found[f"{part}.ids"].to(torch.int64)[:, :longest], found[f"{part}.length"].long()
        mask = (torch.arange(ids.shape[1])[None] < length[:, None]).long()
        out[part] = {"input_ids": ids, "attention_mask": mask, "labels": found[f"{part}.labels"].long()}
    return out


def base_of(folder: Path, classes: int, device: str, seed: int = 0, dropout: float | None = None) -> Any:
    """MiniLM in fp32 (its weights rounded to bf16) with a fresh head."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    described = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in ("id2label", "label2id", "architectures")}
    config = BertConfig.from_dict(described | {"num_labels": classes, "dtype": "float32"})
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config).float()
    missing = model.bert.load_state_dict({k: v.float() for k, v in load_file(folder / "base.safetensors").items()}, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys), missing
    return model.to(device).eval()


def sample(pool: dict[str, Any], k: int, seed: int) -> dict[str, Any]:
    """k rows at random, with at least one of each class."""
    import torch

    order = torch.randperm(len(pool["labels"]), generator=torch.Generator().manual_seed(seed))
    labels = pool["labels"][order]
    first = [int((labels == c).nonzero()[0]) for c in labels.unique()]
    rest = [i for i in range(len(labels)) if i not in set(first)]
    rows = order[(first + rest)[:k]]
    return {key: v[rows] for key, v in pool.items()}


def shortest_first(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows in the order of their lengths, so that batches can be cut to their longest: no score hangs on the order."""
    at = rows["attention_mask"].sum(1).argsort(stable=True)
    return {k: v[at] for k, v in rows.items()}


def batches(rows: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Batches of `size`, each cut to its longest row."""
    lengths = rows["attention_mask"].sum(1).tolist()
    for i in range(0, len(lengths), size):
        longest = max(lengths[i : i + size])
        yield {k: v[i : i + size, :longest] if v.dim() > 1 else v[i : i + size] for k, v in rows.items()}


def predict(model: Any, names: list[str], rows: dict[str, Any], wide: int) -> list[Any]:
    """The classes that each adapter gives to rows, all adapters in one pass of `wide` rows."""
    import torch

    import veneer as vn

    model.eval()
    found: list[list[Any]] = [[] for _ in names]
    k = len(names)
    with torch.no_grad():
        for b in batches(rows, max(1, wide // k)):
            ids, mask = b["input_ids"], b["attention_mask"]
            with vn.route(model, [name for name in names for _ in range(len(ids))]):
                logits = model(input_ids=ids.repeat(k, 1), attention_mask=mask.repeat(k, 1)).logits
            for mine, out in zip(found, logits.argmax(-1).split(len(ids)), strict=True):
                mine.append(out)
    return [torch.cat(f) for f in found]


def measures(guess: Any, truth: Any, classes: int) -> dict[str, float]:
    f1 = []
    for c in range(classes):
        hit = int(((guess == c) & (truth == c)).sum())
        both = int((guess == c).sum()) + int((truth == c).sum())
        if both:
            f1.append(2 * hit / both)
    return {"accuracy": float((guess == truth).float().mean()), "f1": sum(f1) / len(f1)}


def predict_active(model: Any, rows: dict[str, Any], wide: int) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax(-1) for b in batches(rows, wide)])


def some(rows: dict[str, Any], n: int | None) -> dict[str, Any]:
    return rows if n is None else {k: v[:n] for k, v in rows.items()}
