"""Low-rank deviations of many adapters in one batch: every row of x has factors of its own.

    y_b <- y_b + (x_b A_eᵀ) B_eᵀ,   e = index[b]

Shapes: x (n, …, in), y (n, …, out); A (E, r, in) and B (E, out, r) hold the factors of E slots, smaller ranks padded with
zeros, scales multiplied into B. `index` (S,) names the slot of each of S groups of n/S neighbouring rows; None: S = E, the
slots in their order. Then nothing is gathered, and in decoding the stacks are read once, where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemv
from .fresh import fresh


def reference(x: Tensor, y: Tensor, a: Tensor, b: Tensor, index: Sequence[int]) -> Tensor:
    """The same, written plainly: row by row; `index` has the slot of every row."""
    return torch.stack([y[i] + F.linear(F.linear(x[i], a[e]), b[e]) for i, e in enumerate(index)])


def low(x: Tensor, a: Tensor, index: Tensor | None = None) -> Tensor:
    """z = x Aᵀ by groups, (S, n/S · …, r)."""
    a = a if index is None else a.index_select(0, index)
    return torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2))


def add(y: Tensor, z: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """y + z Bᵀ for z as `low` gives it; y is overwritten where autograd has no use for it."""
    b = (b if index is None else b.index_select(0, index)).transpose(1, 2)
    if torch.compiler.is_compiling():  # a sum that the compiler can join to what follows
        return y + torch.bmm(z, b).view(y.shape)
    flat = y.reshape(b.shape[0], -1, y.shape[-1])
    if torch.is_grad_enabled() and (y.requires_grad or z.requires_grad or b.requires_grad):
        return torch.baddbmm(flat, z, b).view(y.shape)
    return flat.baddbmm_(z, b).view(y.shape)


Box = tuple[int, int, int, int, int]  # slot, first and last row, first and last column


class Places:
    """Where tensors lie in a stack of `shape` (E, rows, columns): tensor i in boxes[i]."""

    def __init__(self, shape: tuple[int, int, int], boxes: list[Box]) -> None:
        self.shape, self.boxes = shape, boxes
        blocks = [box[1:] for box in boxes[:: shape[0]]]
        # all slots alike: then one call makes the views of a whole block
        self.blocks = blocks if boxes == [(e, *b) for b in blocks for e in range(shape[0])] else None
        self.full = self.blocks is not None and sum((k - i) * (q - p) for i, k, p, q in blocks) == shape[1] * shape[2]

    def views(self, stack: Tensor) -> list[Tensor]:
        if self.blocks is not None:
            return [v for i, k, p, q in self.blocks for v in stack[:, i:k, p:q].unbind(0)]
        return [stack[e, i:k, p:q] for e, i, k, p, q in self.boxes]

    def new(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return (torch.empty if self.full else torch.zeros)(self.shape, dtype=dtype, device=like.device)


def fill(stack: Tensor, places: Places, tensors: Sequence[Tensor], scales: Sequence[float] | None = None) -> Tensor:
    """Copy the tensors (times their scales) to their places, in as few kernels as there are."""
    own: Any = list(tensors)
    if scales is not None and any(s != 1 for s in scales):
        own = torch._foreach_mul(own, list(scales))
    torch._foreach_copy_(places.views(stack), own)
    return stack


class Stack(torch.autograd.Function):
    """(places, scales, dtype, *tensors) -> the stack of the tensors; each gets back its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, places: Places, scales: list[float] | None, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.places, ctx.scales, ctx.dtypes = places, scales, [t.dtype for t in tensors]
        return fresh(fill(places.new(tensors[0], dtype), places, tensors, scales))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        first, s = ctx.dtypes[0], ctx.scales or [1.0]
        g = g.to(first)
        if len(set(s)) == 1:
            if s[0] != 1:
                g = g * s[0]
            own = ctx.places.views(g)
        else:
            own = torch._foreach_mul(ctx.places.views(g), list(s))
        return None, None, None, *(t if d == first else t.to(d) for t, d in zip(own, ctx.dtypes, strict=True))


@torch.library.custom_op("veneer::routed_gemv", mutates_args=(), schema="(Tensor x, Tensor a, Tensor b, Tensor? index, int[] outs) -> Tensor")
def decoded(x: Tensor, a: Tensor, b: Tensor, index: Tensor | None, outs: list[int]) -> Tensor:
    return gemv.gemv(x, a, b, index, outs)


@decoded.register_fake
def _(x: Any, a: Any, b: Any, index: Any, outs: Any) -> Any:
    return x.new_empty(x.shape[0], b.shape[1])
