"""The loss of a language model's head without its logits: cross entropy of h Wᵀ + b, a few rows at a time.

    loss = Σ_rows (logsumexp(h Wᵀ + b) - (h Wᵀ + b)[label]) / n

The logits of 8192 tokens over 128,256 words are 2 GiB in bf16 and 4 in fp32, and their gradient as much again. Here a
chunk's logits are made, turned into their own gradient (softmax - onehot), multiplied by W, and dropped. W and b are
frozen, so dh is all that is kept. Rows whose label is to be ignored are left out first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import linear

CHUNK_BYTES = 1 << 28


def reference(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, count: Any = None, ignore: int = -100) -> Tensor:
    """The same, written plainly: h (N, d), w (V, d), labels (N,); `count` divides the sum, by default the rows kept."""
    logits = F.linear(h, w, b).float()
    if count is None:
        return F.cross_entropy(logits, labels, ignore_index=ignore)
    return F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum") / count


def loss_and_slope(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Σ of the rows' losses, and softmax - onehot in the logits' dtype; rows to ignore count nothing."""
    real = (labels != ignore)[:, None]
    x = logits.float()
    lse = torch.logsumexp(x, 1, keepdim=True)
    hit = torch.arange(x.shape[1], device=x.device)[None] == labels[:, None]
    loss = torch.where(real, lse - torch.where(hit, x, 0.0).sum(1, keepdim=True), 0.0).sum()
    slope = torch.where(real, torch.exp(x - lse) - hit.to(x.dtype), 0.0)
    return loss, slope.to(logits.dtype)


def in_place(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """`loss_and_slope` for eager mode: as few passes and copies as separate calls allow."""
    real = labels != ignore
    x = logits.float()
    lse = torch.logsumexp(x, 1)
    at = labels.clamp(min=0)[:, None]
    loss = torch.where(real, lse - x.gather(1, at).squeeze(1), 0.0).sum()
    x = x.sub_(lse[:, None]).exp_()  # fp32 logits are ours to overwrite as well
    x.scatter_add_(1, at, x.new_full((1, 1), -1.0).expand_as(at))
    x.mul_(real[:, None])
    return loss, x.to(logits.dtype)


_COMPILED: dict[str, Callable[..., Any]] = {}


def compiled() -> Callable[..., Any]:
    """`loss_and_slope` as one or two kernels."""
    if "slope" not in _COMPILED:
        _COMPILED["slope"] = torch.compile(loss_and_slope, dynamic=False)
    return _COMPILED["slope"]


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, count: Any, ignore: int, chunk: int, slope: Callable[..., Any]) -> Tensor:
        keep = (labels != ignore).nonzero().squeeze(1)
        whole = keep.numel() == labels.numel()
        rows, own = (h, labels) if whole else (h.index_select(0, keep), labels.index_select(0, keep))
        n = rows.shape[0]
        dh = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for i in range(0, n, chunk):
            part, mine = rows[i : i + chunk], own[i : i + chunk]
            size = part.shape[0]
            if size < chunk and n > chunk:  # of one size, so that a compiled slope is compiled once
                part, mine = F.pad(part, (0, 0, 0, chunk - size)), F.pad(mine, (0, chunk - size), value=ignore)
            loss, d = slope(linear(part, w, b), mine, ignore)
            total += loss
            dh[i : i + size] = linear(d, w.t())[:size]
        n = max(n, 1) if count is None else count
        ctx.save_for_backward(dh, None if whole else keep)
        ctx.count, ctx.rows = n, h.shape[0]
        return (total / n).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        dh, keep = ctx.saved_tensors
        dh = dh * (g / ctx.count).to(dh.dtype)
        if keep is not None:
            dh = dh.new_zeros(ctx.rows, dh.shape[1]).index_copy_(0, keep, dh)
        return dh, None, None, None, None, None, None, None


def linear_cross_entropy(
    h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, count: Any = None, ignore: int = -100, chunk: int | None = None, compile: bool = False
) -> Tensor:
    """The loss as `reference` has it, for a frozen w and b and h (…, d), labels (…) of the same leading shape.

    chunk      rows at a time; by default as many as give 256 MiB of logits, at least 128
    compile    turn each chunk's softmax into one kernel with torch.compile
    """
    if chunk is None:
        fits = max(128, CHUNK_BYTES // (w.shape[0] * h.element_size()))
        chunk = 1 << (fits.bit_length() - 1)
    return LinearCrossEntropy.apply(h.reshape(-1, h.shape[-1]), w, b, labels.reshape(-1), count, ignore, chunk, compiled() if compile else in_place)
