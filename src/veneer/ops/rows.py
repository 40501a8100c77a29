"""Frozen linears and the low-rank deviations of many adapters in one operation, forward and backward.

    y_i = x W_iᵀ + c_i + (x' A_eᵀ)_i B_{e,i}ᵀ      for the maps i that share x;  e the slot of the row;  x' is x, or x after dropout

As ops/lora.py does for one adapter: z = x' Aᵀ is one product for all maps and is kept with x; B's product is added while W's own
is in the accumulator (in place, where that cannot be), and A's onto dx likewise; there is no dW, and dx is one sum.

Shapes: x (N, in), W_i (out_i, in), A (E, M r, in), B (E, Σ out, r); groups of rows and `index` as in ops/routed.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fresh import fresh
from .products import add_, linear

kernels: Any = None
if torch.cuda.is_available() and min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) >= (9, 0):
    try:
        from . import rows_triton as kernels
    except ImportError:  # torch without Triton
        kernels = None


trusted = False  # set by ops/trust.py, where there is a GPU
EAGER = False  # a product of torch's is launched faster from Python


def fits(x: Tensor, groups: int, outs: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether the kernels take these sizes, and pay: large products in half precision, 128 rows or a multiple in each group."""
    if not trusted or not (EAGER or torch.compiler.is_compiling()) or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_cuda or len(outs) > 3:
        return False
    k = x.shape[-1]
    n = x.numel() // k
    return n % (groups * kernels.BM) == 0 and n >= 512 and min(outs) * k >= 1 << 20 and all(s % 8 == 0 for s in (k, *outs, *ranks))


def reference(x: Tensor, ws: Sequence[Tensor], cs: Sequence[Tensor | None], a: Tensor, b: Tensor, index: Sequence[int]) -> list[Tensor]:
    """The same, written plainly: row by row; `index` has the slot of every row."""
    r, out, start = b.shape[2], [], 0
    for i, (w, c) in enumerate(zip(ws, cs, strict=True)):
        low, up = a[:, i * r : (i + 1) * r], b[:, start : start + w.shape[0]]
        out.append(torch.stack([F.linear(row, w, c) + F.linear(F.linear(row, low[e]), up[e]) for row, e in zip(x, index, strict=True)]))
        start += w.shape[0]
    return out


def augmented(x: Tensor, w: Tensor, c: Tensor | None, z: Tensor, b: Tensor, start: int, index: Tensor | None) -> Tensor:
    if fits(x, _groups(b, index), [w.shape[0]], [b.shape[2]]):
        return torch.ops.veneer_rows.augmented(x, w, c, z, b, start, index)
    y = linear(x, w, c)
    up = _chosen(b, index)[:, start : start + w.shape[0]]
    by_groups(y, up).baddbmm_(by_groups(z, up), up.transpose(1, 2))
    return fresh(y)


def gathered(gs: list[Tensor], ws: list[Tensor], dz: Tensor | None, a: Tensor, index: Tensor | None) -> Tensor:
    """Σ g_i W_i, and dz A where there is a dz."""
    if dz is not None and fits(gs[0], _groups(a, index), [ws[0].shape[1]], [a.shape[1], *(w.shape[0] for w in ws)]):
        return torch.ops.veneer_rows.gathered(gs, ws, dz, a, index)
    dx = linear(gs[0], ws[0].t())
    for g, w in zip(gs[1:], ws[1:], strict=True):
        add_(dx, g, w.t())
    if dz is not None:
        low = _chosen(a, index)
        by_groups(dx, low).baddbmm_(by_groups(dz, low), low)
    return dx


def by_groups(t: Tensor, stack: Tensor) -> Tensor:
    return t.unflatten(0, (stack.shape[0], -1))


def _groups(stack: Tensor, index: Tensor | None) -> int:
    return stack.shape[0] if index is None else index.shape[0]


def _chosen(stack: Tensor, index: Tensor | None) -> Tensor:
    return stack if index is None else stack.index_select(0, index)


class Rows(torch.autograd.Function):
    """(index, x, x' or None, A, B, n, *W, *c) -> y_1, …, y_n. W and c are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx: Any, index: Tensor | None, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, n: int, *tensors: Any) -> Any:
        ws, cs, r = tensors[:n], tensors[n:], b.shape[2]
        low, down = x if dropped is None else dropped, _chosen(a, index)
        z = torch.bmm(by_groups(low, down), down.transpose(1, 2)).flatten(0, 1)
        ys, start = [], 0
        for i, (w, c) in enumerate(zip(ws, cs, strict=True)):
            ys.append(augmented(x, w, c, z[:, i * r : (i + 1) * r], b, start, index))
            start += w.shape[0]
        ctx.dropout, ctx.need_x = dropped is not None, ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(index, low, z, a, b, *ws)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs: Any) -> Any:
        index, low, z, a, b, *ws = ctx.saved_tensors
        r, down, up = b.shape[2], _chosen(a, index), _chosen(b, index)
        full = [g.contiguous() if g is not None else low.new_zeros(low.shape[0], w.shape[0]) for g, w in zip(gs, ws, strict=True)]
        dzs, dups, start = [], [], 0
        for i, g in enumerate(full):
            own = by_groups(g, up)
            dzs.append(torch.bmm(own, up[:, start : start + g.shape[1]]))
            # the transpose is taken on the skinny side
            dups.append(torch.bmm(by_groups(z[:, i * r : (i + 1) * r], up).transpose(1, 2), own).transpose(1, 2))
            start += g.shape[1]
        dz = torch.cat(dzs, 2) if len(dzs) > 1 else dzs[0]
        da, db = torch.bmm(dz.transpose(1, 2), by_groups(low, down)), torch.cat(dups, 1)
        if index is not None:
            da, db = (torch.zeros_like(t).index_add_(0, index, d) for t, d in ((a, da), (b, db)))
        dx = dlow = None
        if ctx.need_x:
            dz = dz.flatten(0, 1)
            dx = gathered(full, list(ws), None if ctx.dropout else dz, a, index)
            dlow = torch.bmm(by_groups(dz, down), down).flatten(0, 1) if ctx.dropout else None
        return None, dx, dlow, da, db, None, *[None] * (2 * len(ws))


def rows(
    x: Tensor, ws: Sequence[Tensor], cs: Sequence[Tensor | None], a: Tensor, b: Tensor, index: Tensor | None = None, dropped: Tensor | None = None
) -> list[Tensor]:
    """[y_1, …, y_n], x (rows, …, in). All tensors in one dtype; the W_i and c_i must be frozen."""
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    low = None if dropped is None else dropped.reshape(flat.shape)
    return [y.reshape(*lead, y.shape[-1]) for y in Rows.apply(index, flat, low, a, b, len(ws), *ws, *cs)]


if kernels is not None:  # as operators that a compiler leaves alone
    _lib = torch.library.Library("veneer_rows", "DEF")
    _lib.define("augmented(Tensor x, Tensor w, Tensor? c, Tensor z, Tensor b, int start, Tensor? index) -> Tensor")
    _lib.define("gathered(Tensor[] gs, Tensor[] ws, Tensor dz, Tensor a, Tensor? index) -> Tensor")
    _lib.impl("augmented", kernels.augmented, "CUDA")
    _lib.impl("gathered", kernels.gathered, "CUDA")

    @torch.library.register_fake("veneer_rows::augmented", lib=_lib)
    def _(x: Any, w: Any, c: Any, z: Any, b: Any, start: Any, index: Any) -> Tensor:
        return x.new_empty(x.shape[0], w.shape[0])

    @torch.library.register_fake("veneer_rows::gathered", lib=_lib)
    def _(gs: Any, ws: Any, dz: Any, a: Any, index: Any) -> Tensor:
        return gs[0].new_empty(gs[0].shape[0], ws[0].shape[1])
