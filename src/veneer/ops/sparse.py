"""Products with a sparse matrix whose entries are trained: y = S x, S (out, in) with k values at fixed places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fresh import fresh

# Gathering costs T k numbers moved, one by one; the dense product T out in multiplications at full speed. Where k is under
# this share of the matrix, gathering is faster on a CPU (see benchmarks/sparse_memory.py), and no (out, in) matrix is made.
SHARE = 1 / 512
AT_ONCE = 1 << 22  # numbers that one gather may hold


class SparseProduct(torch.autograd.Function):
    """y = S x for x (T, in). Keeps x, the values and their places; never S, nor the gradient by S.

    dv_i = Σ_t dy[t, row_i] x[t, col_i].  Autograd over a dense S would keep one (out, in) matrix for every map until the
    backward pass; here there is one at a time, and none where k is small.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.out = out
        if not gathers(index.numel(), out, x.shape[1]):
            return x @ dense(values, index, out, x.shape[1]).t()
        y = x.new_zeros(x.shape[0], out)
        for at in pieces(index, x.shape[0]):
            rows, cols = places(index[at], x.shape[1])
            y.index_add_(1, rows, x.index_select(1, cols) * values[at])
        return fresh(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, values, index = ctx.saved_tensors
        dy = grads[0]
        wants_x, wants_v = ctx.needs_input_grad[:2]
        if not gathers(index.numel(), ctx.out, x.shape[1]):
            dx = dy @ dense(values, index, ctx.out, x.shape[1]) if wants_x else None
            dv = (dy.t() @ x).flatten().index_select(0, index) if wants_v else None
            return dx, dv, None, None
        dx = torch.zeros_like(x) if wants_x else None
        dv = []
        for at in pieces(index, x.shape[0]):
            rows, cols = places(index[at], x.shape[1])
            seen = dy.index_select(1, rows)
            if wants_v:
                dv.append((seen * x.index_select(1, cols)).sum(0))
            if dx is not None:
                dx.index_add_(1, cols, seen * values[at])
        return dx, torch.cat(dv) if wants_v else None, None, None


def sparse_product(x: Tensor, values: Tensor, index: Tensor, out: int) -> Tensor:
    """S x over the last dimension of x, for the `values` (k) at the flat places `index` (k) of S (out, in)."""
    y: Any = SparseProduct.apply(x.reshape(-1, x.shape[-1]), values, index, out)
    return y.reshape(*x.shape[:-1], out)


def gathers(k: int, out: int, inp: int) -> bool:
    return k <= SHARE * out * inp


def pieces(index: Tensor, tokens: int) -> list[slice]:
    n = max(1, AT_ONCE // max(1, tokens))
    return [slice(i, min(i + n, index.numel())) for i in range(0, index.numel(), n)]


def places(index: Tensor, inp: int) -> tuple[Tensor, Tensor]:
    return index.div(inp, rounding_mode="floor"), index.remainder(inp)


def dense(values: Tensor, index: Tensor, out: int, inp: int) -> Tensor:
    """S itself."""
    return values.new_zeros(out * inp).index_copy(0, index.long(), values).reshape(out, inp)
