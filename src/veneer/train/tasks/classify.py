"""Tasks that give a text, or two, one answer: a class, several classes, or a number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding

from ...data.formats import BadRow
from ...data.tables import Table
from .base import CLASSES, Task, class_scores, confusion, logits_of, rows_of

NUMBERS = 2000  # pairs of truth and answer that the report draws


class _OfText(Task):
    """Texts to tensors; a subclass gives the target of a row."""

    auto = "AutoModelForSequenceClassification"
    formats = ("text-pair", "text-label")
    head = True

    def target(self, row: dict[str, Any]) -> Any:
        raise NotImplementedError

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        columns, lengths = self.tokenize([r["text"] for r in rows], [r["pair"] for r in rows] if "pair" in rows[0] else None)
        out: list[dict[str, Any] | BadRow] = []
        for encoded, row, length in zip(rows_of(columns), rows, lengths, strict=True):
            try:
                out.append(encoded | {"labels": self.target(row), "length": length})
            except BadRow as bad:
                out.append(bad)
        return out

    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tools)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(self.tools.decode(row["input_ids"], skip_special_tokens=True), False), (f" → {self.shown(row['labels'])}", True)]

    def shown(self, target: Any) -> str:
        return str(target)


class TextClassification(_OfText):
    """One class of several: cross-entropy over the classes."""

    name = "text-classification"
    measures = CLASSES
    best = "macro_f1"
    model_options = {"problem_type": "single_label_classification"}

    def names(self, table: Table) -> list[str]:
        return table.names

    def marks(self, table: Table) -> list[str]:
        return list(table.labels or ())

    def target(self, row: dict[str, Any]) -> int:
        if not isinstance(row["label"], str):
            raise BadRow(f"the label is a list, {row['label']!r}", "task=multi-label-classification takes lists")
        return self.labels.index(row["label"])

    def shown(self, target: Any) -> str:
        return self.labels[target]

    def scores(self, prediction: Any) -> dict[str, float]:
        return class_scores(logits_of(prediction).argmax(-1), prediction.label_ids)

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        return confusion(self, trainer, run)


class MultiLabel(_OfText):
    """Any number of classes: binary cross-entropy for each. Labels are lists, or text with | between them."""

    name = "multi-label-classification"
    measures = {"loss": False, "exact": True, "micro_f1": True}
    best = "micro_f1"
    model_options = {"problem_type": "multi_label_classification"}

    def of(self, row: dict[str, Any]) -> list[str]:
        label = row["label"]
        return label if isinstance(label, list) else [part.strip() for part in label.split("|") if part.strip()]

    def names(self, table: Table) -> list[str]:
        return sorted(set(self.marks(table)))

    def marks(self, table: Table) -> list[str]:
        return [name for row in table.rows for name in self.of(row)]

    def target(self, row: dict[str, Any]) -> list[float]:
        own = self.of(row)
        return [float(name in own) for name in self.labels]

    def shown(self, target: Any) -> str:
        return " | ".join(name for name, on in zip(self.labels, target, strict=True) if on) or "(none)"

    def scores(self, prediction: Any) -> dict[str, float]:
        """Exact matches, and micro-F1 over all (row, class) decisions at probability 0.5."""
        guess, truth = logits_of(prediction) > 0, prediction.label_ids > 0.5
        either = int(guess.sum() + truth.sum())
        return {"exact": float((guess == truth).all(-1).mean()), "micro_f1": 2 * int((guess & truth).sum()) / either if either else 0.0}

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        last = trainer.compute_metrics.last
        guess, truth = logits_of(last) > 0, last.label_ids > 0.5
        counts = ((guess & truth).sum(0), (guess & ~truth).sum(0), (~guess & truth).sum(0))
        return {"labels": self.labels, "decisions": [[int(n) for n in one] for one in zip(*counts, strict=True)]}


class Regression(_OfText):
    """A number: mean squared error. Give it in a range near -1 to 1, or the first steps go into the scale."""

    name = "regression"
    measures = {"loss": False, "mae": False, "pearson": True, "spearman": True}
    model_options = {"problem_type": "regression", "num_labels": 1}

    def target(self, row: dict[str, Any]) -> float:
        try:
            value = float(row["label"])
        except (TypeError, ValueError):
            raise BadRow(f"the label {row['label']!r} is no number", "task=text-classification takes classes") from None
        if not math.isfinite(value):
            raise BadRow(f"the label {row['label']!r} is not finite")
        return value

    def scores(self, prediction: Any) -> dict[str, float]:
        """Mean absolute error, Pearson's r, and Spearman's: Pearson's of the ranks (ties in order of rows)."""
        guess, truth = logits_of(prediction).reshape(-1).astype(np.float64), np.asarray(prediction.label_ids, np.float64).reshape(-1)
        ranks = [np.argsort(np.argsort(v, kind="stable")).astype(np.float64) for v in (guess, truth)]
        return {"mae": float(np.abs(guess - truth).mean()), "pearson": _correlation(guess, truth), "spearman": _correlation(*ranks)}

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        last = trainer.compute_metrics.last
        pairs = np.stack([np.asarray(last.label_ids, np.float64).reshape(-1), logits_of(last).reshape(-1).astype(np.float64)], 1)
        return {"numbers": pairs[:: -(-len(pairs) // NUMBERS)].tolist()}


def encode_texts(rows: Table, tokenizer: Any, labels: list[str], longest: int) -> Any:
    """A dataset of input_ids, attention_mask and, where there are `labels`, each text's class, cut to `longest` tokens."""
    from datasets import Dataset

    data: dict[str, Any] = dict(tokenizer(rows.texts, truncation=True, max_length=longest, return_token_type_ids=False))
    if labels:
        data["labels"] = [labels.index(name) for name in rows.labels or ()]
    return Dataset.from_dict(data)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0
