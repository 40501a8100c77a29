"""Sentence embeddings: texts that belong together lie near each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.formats import BadRow
from .base import Task, logits_of
from .classify import Regression

SCALE = 20.0  # the inverse temperature that sentence-transformers uses for cosines


class SentenceEmbedding(Task):
    """Mean-pooled states h; cosines s(a, b) = h_a · h_b / (|h_a| |h_b|).

    Pairs (and a negative, where there is one): every other row's second text is a negative too,

        loss = -mean_i log( exp(20 s(a_i, b_i)) / Σ_j exp(20 s(a_i, b_j)) )        (Henderson et al. 2017; InfoNCE)

    Pairs with a number from -1 to 1: loss = mean_i (s(a_i, b_i) - label_i)².
    """

    name = "sentence-embedding"
    auto = "AutoModel"
    formats = ("text-pair", "pair")
    coupled = True
    measures = {"loss": False, "recall_at_1": True, "spearman": True}

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        parts = [p for p in ("text", "pair", "negative") if all(r.get(p) for r in rows)]
        if "negative" not in parts and any(r.get("negative") for r in rows):
            return [BadRow("a column of negatives is empty in some rows", "Give every row one, or leave the column out: data.columns.negative")] * len(rows)
        encoded = [self.tokenize([r[p] for r in rows]) for p in parts]
        score = Regression.target
        out: list[dict[str, Any] | BadRow] = []
        for i, row in enumerate(rows):
            try:
                given = {"labels": score(self, row)} if "label" in row else {}  # type: ignore[arg-type]
                if given and not -1 <= given["labels"] <= 1:
                    raise BadRow(f"the label {row['label']} is not within -1 to 1, as cosines are")
                out.append({"texts": [columns["input_ids"][i] for columns, _ in encoded], "length": max(lengths[i] for _, lengths in encoded)} | given)
            except BadRow as bad:
                out.append(bad)
        return out

    def collator(self) -> Any:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            flat = [{"input_ids": row["texts"][k]} for k in range(len(rows[0]["texts"])) for row in rows]  # all first texts, all second, …
            batch = dict(self.tools.pad(flat, return_tensors="pt"))
            batch["labels"] = torch.tensor([row["labels"] for row in rows]) if "labels" in rows[0] else torch.arange(len(rows))
            return batch

        return collate

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        labels = batch["labels"]
        h = pooled(model, {k: v for k, v in batch.items() if k != "labels"})
        first, *others = h.view(-1, len(labels), h.shape[-1])
        if labels.is_floating_point():
            found = F.mse_loss((first * others[0]).sum(-1), labels.to(h.dtype))
        else:
            found = F.cross_entropy(SCALE * first @ torch.cat(others).T, labels)
        return found, {"loss": found, "logits": torch.stack([first, others[0]], 1)}

    def scores(self, prediction: Any) -> dict[str, float]:
        """Pairs: recall@1, how often a row's own second text is the nearest of all. With numbers: Spearman's r."""
        found = logits_of(prediction)
        first, second = found[:, 0], found[:, 1]
        if np.issubdtype(prediction.label_ids.dtype, np.floating):
            cosines = type(prediction)(predictions=(first * second).sum(-1), label_ids=prediction.label_ids)
            return {"spearman": Regression.scores(self, cosines)["spearman"]}  # type: ignore[arg-type]
        return {"recall_at_1": float(((first @ second.T).argmax(-1) == np.arange(len(first))).mean())}

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        texts = [self.tools.decode(ids) for ids in row["texts"]]
        return [(texts[0], False), *((f" ~ {t}", True) for t in texts[1:]), *([(f" {row['labels']}", True)] if "labels" in row else [])]


def pooled(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean of the last states over tokens that are not padding, of length 1. (texts, width)"""
    h = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].to(h.dtype)
    return F.normalize((h * weight).sum(1) / weight.sum(1), dim=-1)
