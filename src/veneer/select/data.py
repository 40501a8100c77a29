"""The data of a selection: examples to train on and to score on, how they become batches, and what is scored."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calls import device_of, evaluating, moved
from ..errors import ConfigError, DataError, did_you_mean
from ..plan import short, whole

LONGEST = 512  # tokens of a text that is given as it is
DRAWS = 100  # bootstrap draws of the evaluation examples


def accuracy(logits: Any, truth: Any) -> float:
    """The share of examples whose largest logit is the true class."""
    return float((logits.argmax(-1) == truth).mean())


def macro_f1(logits: Any, truth: Any) -> float:
    """The mean over classes of 2TP / (2TP + FP + FN)."""
    guess, out = logits.argmax(-1), []
    for c in range(logits.shape[-1]):
        either = int((guess == c).sum() + (truth == c).sum())
        if either:
            out.append(2 * int(((guess == c) & (truth == c)).sum()) / either)
    return float(np.mean(out))


METRICS: dict[str, Callable[[Any, Any], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}
LOSS = "loss"


@dataclass
class Data:
    """Examples (dicts of model inputs with 'labels'), and how to score them.

    metric   'accuracy', 'macro_f1', 'loss' (minus the mean loss, so that higher is better), or (logits, labels) -> score
    classes  how many classes the labels have; 0: they are not one class for each example
    """

    train: Sequence[Any]
    evaluation: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    metric: str | Callable[[Any, Any], float]
    classes: int = 0
    seed: int = 0

    def rows(self, share: float, which: str, least: int) -> list[int]:
        """A share of the training or evaluation rows, `least` of them at any rate: each smaller sample lies within the
        larger ones, and classes keep their proportions."""
        data = getattr(self, which)
        orders = self.__dict__.setdefault("_orders", {})
        if which not in orders:
            orders[which] = _spread([_label(x) for x in data] if self.classes else [0] * len(data), self.seed)
        return sorted(orders[which][: min(len(data), max(least, round(share * len(data))))])

    def batch(self, which: str, size: int, *, longest: bool = False) -> dict[str, Any]:
        """One batch: the first examples, or the longest ones."""
        data = getattr(self, which)
        rows = range(len(data))
        if longest:
            rows = sorted(rows, key=lambda i: -_length(data[i]))
        return self.collate([data[i] for i in list(rows)[:size]])

    def score(self, model: nn.Module, rows: list[int], size: int) -> tuple[float, list[float]]:
        """(the score of `model` on the evaluation rows, its bootstrap replicates: the same draws for the same rows)."""
        device = device_of(model)
        rows = sorted(rows, key=lambda i: _length(self.evaluation[i]))
        found, truth = [], []
        with evaluating(model), torch.inference_mode():
            for at in range(0, len(rows), size):
                batch = moved(self.collate([self.evaluation[i] for i in rows[at : at + size]]), device)
                out = model(**batch)
                if self.metric == LOSS:
                    found.append(-out.loss.float().reshape(1).cpu())
                else:
                    found.append(out.logits.float().cpu())
                    truth.append(batch["labels"].cpu())
        values = torch.cat(found).numpy()
        if self.metric == LOSS:
            measure: Callable[[Any], float] = lambda i: float(values[i].mean())  # noqa: E731
        else:
            metric = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
            labels = torch.cat(truth).numpy()
            measure = lambda i: float(metric(values[i], labels[i]))  # noqa: E731
        if not np.isfinite(values).all():
            return float("nan"), []
        generator = np.random.default_rng(self.seed)
        everything = np.arange(len(values))
        return measure(everything), [measure(generator.integers(0, len(values), len(values))) for _ in range(DRAWS)]

    def floor(self, model: nn.Module, size: int) -> float:
        """What is had for nothing: the score of the best class given to every example, or, by the loss, of `model` as it is. -inf
        for a metric of one's own, or where that is no finite number."""
        if callable(self.metric):
            return -math.inf
        if self.metric == LOSS:
            found = self.score(model, list(range(len(self.evaluation))), size)[0]
            return found if math.isfinite(found) else -math.inf
        labels = np.array([_label(x) for x in self.evaluation])
        return max(METRICS[self.metric](np.eye(self.classes)[np.full(len(labels), c)], labels) for c in range(self.classes))


def make(data: Any, model: nn.Module, *, tokenizer: Any, collate: Any, metric: Any, examples: int | None, seed: int) -> Data:
    """The `Data` of what a user gives: a pair (training, evaluation), a dict with 'train' and 'eval', or one set, of which a
    fifth is held out. A set is a sequence of examples (dicts with 'labels', tokenised; a datasets.Dataset) or a Table.

    examples   train on that many only, drawn with the seed

    Raises: DataError (nothing there, no labels, only one class, fewer examples than `examples` or than a class each,
    labels that training never sees), ConfigError for an unknown metric.
    """
    train, held = _pair(data)
    names: list[str] = []
    if _is_table(train):
        names = train.names
        train = _tokenised(train, tokenizer, names, model)
        held = None if held is None else _tokenised(held, tokenizer, names, model)
    _check(train, "training")
    classes = _classes(train)
    if held is None:
        order = _spread([_label(x) for x in train] if classes else [0] * len(train), seed + 1)
        cut = max(1, len(train) // 5)
        train, held = [train[i] for i in sorted(order[cut:])], [train[i] for i in sorted(order[:cut])]
    _check(held, "evaluation")
    if examples is not None:
        if not whole(examples):
            raise ConfigError(f"examples={short(examples)}", fix="Give the number of training examples, as 500")
        if examples > len(train):
            raise DataError(f"{examples} training examples are wanted and there are {len(train)}", fix=f"Ask for {len(train)} at most, or hold fewer out")
        order = _spread([_label(x) for x in train] if classes else [0] * len(train), seed)
        train = [train[i] for i in sorted(order[:examples])]
    if classes:
        _check_classes(train, held, model)
    metric = metric if metric is not None else "accuracy" if classes else LOSS
    if not callable(metric) and metric not in (*METRICS, LOSS):
        raise ConfigError(f"there is no metric {short(metric)}", fix=did_you_mean(str(metric), (*METRICS, LOSS)))
    if not classes and metric != LOSS and isinstance(metric, str):
        raise ConfigError(f"{metric} needs one class for each example", fix="Take metric='loss', or a function (logits, labels) -> score")
    if collate is None:
        collate = _padding(tokenizer) if tokenizer is not None else _stack
    return Data(train, held, collate, metric, classes, seed)


def _pair(data: Any) -> tuple[Any, Any]:
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"data is (training, evaluation), not {len(data)} sets", fix="vn.select(model, (train, evaluation), …)")
        return data
    if hasattr(data, "keys") and hasattr(data, "__getitem__"):
        held = next((k for k in ("eval", "evaluation", "validation", "test") if k in data), None)
        if "train" not in data:
            raise DataError(f"data has no 'train' but {', '.join(map(str, data.keys()))}", fix="{'train': …, 'eval': …}")
        return data["train"], data[held] if held else None
    return data, None


def _is_table(data: Any) -> bool:
    return hasattr(data, "texts") and hasattr(data, "labels") and hasattr(data, "names")


def _tokenised(table: Any, tokenizer: Any, names: list[str], model: nn.Module) -> list[dict[str, Any]]:
    """input_ids, attention_mask and the label's number of each text, cut to what the model takes."""
    if tokenizer is None:
        raise DataError("texts need a tokenizer", where=table.source, fix="vn.select(model, data, tokenizer=…)")
    from ..train.tasks.classify import encode_texts

    if not names:
        raise DataError("the texts have no labels", where=table.source, fix="Name the column with the labels, or give tokenised examples")
    extra = sorted(set(table.names) - set(names))
    if extra:
        raise DataError(f"labels that training never sees: {', '.join(extra)}", where=table.source, fix="Take those rows out, or add examples of them")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or LONGEST
    return list(encode_texts(table, tokenizer, names, min(limit, tokenizer.model_max_length, LONGEST)))


def _check(data: Any, what: str) -> None:
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(f"the {what} data is {short(data)}", fix="Give a list of examples or a datasets.Dataset: dicts of model inputs with 'labels'")
    if not len(data):
        raise DataError(f"there are no {what} examples", fix="Give some, with labels")
    first = data[0]
    if not hasattr(first, "keys"):
        raise DataError(f"an example is a dict of model inputs, not {type(first).__name__}", where=f"{what} example 0", fix="{'input_ids': […], 'labels': 1}")
    if "labels" not in first:
        raise DataError(
            f"an example has no 'labels' but {', '.join(map(str, first))}", where=f"{what} example 0", fix="Add them; without labels there is no loss"
        )


def _label(example: Any) -> int | None:
    label = example["labels"]
    label = label.item() if isinstance(label, torch.Tensor) and label.dim() == 0 else label
    return int(label) if isinstance(label, (int, np.integer)) and not isinstance(label, bool) else None


def _classes(data: Any) -> int:
    """1 + the largest class, where each example has one; else 0."""
    labels = [_label(x) for x in data]
    known = [x for x in labels if x is not None]
    return 1 + max(known) if len(known) == len(labels) else 0


def _check_classes(train: Any, held: Any, model: nn.Module) -> None:
    seen, wanted = Counter(_label(x) for x in train), Counter(_label(x) for x in held)
    if len(seen) < 2:
        raise DataError(f"all {len(train)} training examples have one label, {next(iter(seen))}", fix="A classifier needs two classes or more")
    new = sorted(c for c in wanted if c not in seen)
    if new:
        raise DataError(f"labels that training never sees: {', '.join(map(str, new))}", fix="Train on more examples, or take those out of the evaluation")
    room = getattr(getattr(model, "config", None), "num_labels", None)
    if room is not None and (max(seen) >= room or min(seen) < 0):  # type: ignore[operator,type-var]
        raise DataError(f"labels from {min(seen)} to {max(seen)}, and the model has {room} classes", fix="Load the model with num_labels=…")  # type: ignore[type-var]


def _spread(labels: list[Any], seed: int) -> list[int]:
    """An order of which every beginning has the labels in their proportions."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    seen, totals, place = Counter(), Counter(labels), {}
    for i in order:
        place[i] = (seen[labels[i]] + 0.5) / totals[labels[i]]
        seen[labels[i]] += 1
    return sorted(order, key=lambda i: place[i])


def _length(example: Any) -> int:
    return max((np.shape(v)[0] for v in example.values() if np.ndim(v)), default=0)


class _padding:
    """The tokenizer's own padding, and no more than what a worker elsewhere can be sent."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

        ragged = _label(examples[0]) is None and hasattr(examples[0]["labels"], "__len__")
        kind = DataCollatorForSeq2Seq if ragged else DataCollatorWithPadding  # the first pads labels too, with -100
        return dict(kind(self.tokenizer)([dict(e) for e in examples]))


def _stack(examples: list[Any]) -> dict[str, Any]:
    try:
        return {k: torch.stack([torch.as_tensor(e[k]) for e in examples]) for k in examples[0]}
    except (RuntimeError, KeyError, TypeError, ValueError) as e:
        raise DataError(
            f"the examples do not stack into a batch: {str(e).partition(chr(10))[0]}", fix="Give tokenizer=…, which pads them, or collate=…"
        ) from None
