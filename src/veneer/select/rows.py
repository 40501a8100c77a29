"""What the candidates of a race read and how it is judged: examples in an order of their own, a loss, a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Rows:
    """Examples by number, as batches on the model's device.

    data   a sequence of dicts (input_ids, labels, … as lists, numbers or 1-D tensors), or one dict of tensors with an
           example in each row
    pad    input_ids of padding; labels are padded with -100, everything else with 0
    """

    def __init__(self, data: Any, *, pad: int, device: Any, what: str) -> None:
        self.pad, self.device = pad, device
        self.table: dict[str, Tensor] | None = None
        self.lengths: Tensor | None = None
        if isinstance(data, Mapping):
            self.table = {k: v.to(device) for k, v in data.items()}
            sizes = {len(v) for v in self.table.values()}
            if len(sizes) != 1:
                raise DataError(f"{what}: its tensors have {sorted(sizes)} rows", fix="Give one row for each example in every tensor")
            self.size = sizes.pop()
            mask = self.table.get("attention_mask")
            if mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()):
                self.lengths = mask.sum(1).cpu()
        elif isinstance(data, Sequence) and data and isinstance(data[0], Mapping):
            self.examples = data
            self.size = len(data)
        else:
            raise DataError(f"{what}: examples are a list of dicts or a dict of tensors", fix="For example [{'input_ids': [2, 7, 3], 'labels': 1}, …]")
        if not self.size or "labels" not in (self.table or data[0]):
            raise DataError(f"{what}: " + ("every example needs 'labels'" if self.size else "there are no examples"))

    def __len__(self) -> int:
        return self.size

    def whole(self) -> dict[str, Tensor]:
        """All examples, labels too, padded to the longest."""
        inputs, labels = self.batch(range(self.size))
        return inputs | {"labels": labels}

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs of these rows, cut to the longest of them, and their labels."""
        if self.table is not None:
            at = torch.as_tensor(rows, device=self.device)
            out = {k: v.index_select(0, at) for k, v in self.table.items()}
            if self.lengths is not None:
                longest, whole = int(self.lengths[list(rows)].max()), out["attention_mask"].shape[1]
                out = {k: v[:, :longest] if v.dim() > 1 and v.shape[1] == whole else v for k, v in out.items()}
        else:
            chosen = [self.examples[i] for i in rows]
            out = {k: _stack([e[k] for e in chosen], self.pad if k == "input_ids" else -100 if k == "labels" else 0) for k in chosen[0]}
            if "attention_mask" not in out and "input_ids" in out:
                out["attention_mask"] = _stack([[1] * len(e["input_ids"]) for e in chosen], 0)
            out = {k: v.to(self.device) for k, v in out.items()}
        labels = out.pop("labels")
        return out, labels


def _stack(values: list[Any], pad: int) -> Tensor:
    made = [torch.as_tensor(v) for v in values]
    if made[0].dim() == 0:
        return torch.stack(made)
    return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=pad)


class Order:
    """Which examples step i reads: epochs of n shuffled rows, one after another, cut into batches.

    It is a function of `seed`, n and the batch sizes alone, so that it is the same in a race, alone, and after a resume.

    batches  (first step, size) pairs, the first at step 0
    """

    def __init__(self, n: int, batches: Sequence[tuple[int, int]], seed: int) -> None:
        self.n, self.batches, self.seed = n, list(batches), seed
        self._epoch, self._rows = -1, []

    def size(self, step: int) -> int:
        return next(size for first, size in reversed(self.batches) if first <= step)

    def rows(self, step: int) -> list[int]:
        start = 0
        for (first, size), (stop, _) in zip(self.batches, [*self.batches[1:], (step, 0)], strict=True):
            start += max(0, min(stop, step) - first) * size
        return [self._at(i) for i in range(start, start + self.size(step))]

    def _at(self, i: int) -> int:
        epoch, place = divmod(i, self.n)
        if epoch != self._epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._rows = epoch, torch.randperm(self.n, generator=g).tolist()
        return self._rows[place]


def loss_of(model: Any) -> Loss:
    """(logits, labels) -> (sum of the losses, how many there are), by the shape of the labels.

    Class numbers (n,): cross-entropy. Real numbers: squared error. Tokens (n, T), -100 left out: cross-entropy, of the
    next token where the model's own loss is a causal one (`loss_type` of transformers' models).
    """
    causal = "CausalLM" in str(getattr(model, "loss_type", ""))

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.is_floating_point():
            return F.mse_loss(logits.float().reshape(labels.shape), labels, reduction="sum"), torch.full((), labels.numel(), device=logits.device)
        if labels.dim() > 1 and causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = labels.reshape(-1)
        return F.cross_entropy(logits.float().reshape(flat.shape[0], -1), flat, reduction="sum"), (flat != -100).sum()

    return loss


class Judge:
    """The score of each candidate on held-out rows, higher is better: accuracy for class numbers, else minus the mean loss."""

    def __init__(self, loss: Loss, metric: Callable[[Tensor, Tensor], float] | None) -> None:
        self.loss, self.metric = loss, metric

    def score(self, logits: list[Tensor], labels: list[Tensor]) -> float:
        if self.metric is not None:
            return float(self.metric(torch.cat(logits), torch.cat(labels)))
        if labels[0].dim() == 1 and not labels[0].is_floating_point():
            out, truth = torch.cat(logits), torch.cat(labels)
            return float("nan") if not bool(out.isfinite().all()) else float((out.argmax(-1) == truth).float().mean())
        sums = [self.loss(x, y) for x, y in zip(logits, labels, strict=True)]
        return -float(sum(s for s, _ in sums)) / max(1, int(sum(n for _, n in sums)))
