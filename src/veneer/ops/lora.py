"""Frozen linears with low-rank deviations, forward and backward in as few passes over the activations as can be.

    y_i = g_i ⊙ (x W_iᵀ + s_i · t_i (x' A_iᵀ) B_iᵀ) + c_i      for the maps i that share the input x

x' is x, or with dropout M ⊙ x / (1 - p), M one mask for all maps. t_i (a gate: one number a token) and g_i (DoRA: one an output
feature) may be absent. The bytes decide, not the arithmetic: with rank r ≪ d each skinny product costs one trip over x, y or dy. So
- z = x' [A_1; A_2; …]ᵀ is one product for all maps, and it is kept (r numbers a token) along with x, once; of dropout, M's bits;
- a gate scales z, and never anything of y's size;
- B's product is added while W's own is in the accumulator (in place, where that cannot be), and A's onto dx likewise;
- dz = dy B and dB = dyᵀ z share one pass over dy;
- there is no dW, and dx of all the maps is one sum.

Shapes: x (N, in), W_i (out_i, in), A_i (r_i, in), B_i (out_i, r_i), c_i and g_i (out_i,), t_i (N, 1), M (N, in); z (N, Σ r_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .skinny import augmented, beside, both, gathered, narrow, outer

Some = Sequence[Tensor | None]
FIELDS = 6  # W, c, A, B, t, g: what a map has


def reference(
    x: Tensor, ws: Sequence[Tensor], cs: Some, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float], dropout: float = 0.0,
    mask: Tensor | None = None, gates: Some | None = None, gains: Some | None = None,
) -> list[Tensor]:  # fmt: skip
    """The same, written plainly."""
    low = x if mask is None else x * mask / (1 - dropout)
    out = []
    for i, (w, c, a, b, s) in enumerate(zip(ws, cs, downs, ups, scales, strict=True)):
        t, g = (None if v is None else v[i] for v in (gates, gains))
        d = s * F.linear(F.linear(low, a), b)
        y = F.linear(x, w) + (d if t is None else d * t)
        y = y if g is None else y * g
        out.append(y if c is None else y + c)
    return out


def _stack(ts: Sequence[Tensor]) -> Tensor:
    return ts[0] if len(ts) == 1 else torch.cat(list(ts))


def _times(t: Tensor, s: Any) -> Tensor:
    return t if s is None or (isinstance(s, float) and s == 1) else t * s


def _gained(u: Tensor, g: Tensor, c: Tensor | None) -> Tensor:
    """g ⊙ u + c in u's dtype; g may be finer than u."""
    if c is not None and g.dtype == u.dtype:
        return torch.addcmul(c, u, g)
    y = u * g if c is None else u * g + c
    return y if y.dtype == u.dtype else y.to(u.dtype)  # no second name of one tensor: see fresh.py


class LowRank(torch.autograd.Function):
    """(n, scales, x, M, *W, *c, *A, *B, *t, *g) -> y_1, …, y_n. W and c are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx: Any, n: int, scales: tuple[float, ...], x: Tensor, mask: Tensor | None, *tensors: Any) -> Any:
        ws, cs, downs, ups, gates, gains = (tensors[i * n : (i + 1) * n] for i in range(FIELDS))
        low = x if mask is None else x * mask
        if len(set(scales)) == 1:
            zs = narrow(low, _stack(downs), scales[0]).split([a.shape[0] for a in downs], 1)
        else:
            zs = [narrow(low, a, s) for a, s in zip(downs, scales, strict=True)]
        ys, us = [], []
        for w, c, b, z, t, g in zip(ws, cs, ups, zs, gates, gains, strict=True):
            y = augmented(x, w, c if g is None else None, _times(z, t), b)
            us.append(None if g is None else y)
            ys.append(y if g is None else _gained(y, g, c))
        ctx.n, ctx.scales, ctx.need_x = n, scales, ctx.needs_input_grad[2]
        ctx.save_for_backward(x, mask, *zs, *us, *ws, *downs, *ups, *gates, *gains)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        n = ctx.n
        x, mask, *rest = ctx.saved_tensors
        zs, us, ws, downs, ups, gates, gains = (rest[i * n : (i + 1) * n] for i in range(7))
        full, dzs, dups, dgates, dgains = [], [], [], [], []
        for dy, z, u, w, b, t, g, s in zip(dys, zs, us, ws, ups, gates, gains, ctx.scales, strict=True):
            # an output that nothing used still has its place in the sums
            dy = x.new_zeros(x.shape[0], w.shape[0]) if dy is None else dy.contiguous()
            dgains.append(None if g is None else (dy * u).sum(0, dtype=g.dtype))
            dy = dy if g is None else (dy * g).to(dy.dtype)
            dz, du = both(dy, _times(z, t), b)
            dgates.append(None if t is None else (dz * z).sum(1, keepdim=True).to(t.dtype))
            dzs.append(_times(_times(dz, t), s).to(x.dtype))
            dups.append(du)
            full.append(dy)
        dz = beside(dzs)
        ddowns = outer(x if mask is None else x * mask, dz).t().split([a.shape[0] for a in downs])
        dx = None
        if ctx.need_x and mask is None:
            dx = gathered(full, ws, dz, _stack(downs))
        elif ctx.need_x:
            dx = gathered(full, ws, None, None).addcmul_(dz @ _stack(downs), mask.to(x.dtype))
        return None, None, dx, None, *[None] * (2 * n), *ddowns, *dups, *dgates, *dgains


def low_rank(
    x: Tensor, ws: Sequence[Tensor], cs: Some, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float], dropout: float = 0.0,
    mask: Tensor | None = None, gates: Some | None = None, gains: Some | None = None,
) -> list[Tensor]:  # fmt: skip
    """[y_1, …, y_n], x of any leading shape, as M's and each t's. All in one dtype but the g_i; the W_i and c_i must be frozen.

    dropout  p; with a p and no `mask`, M is drawn
    """
    n, lead, flat = len(ws), x.shape[:-1], x.reshape(-1, x.shape[-1])
    if dropout:
        mask = torch.rand(flat.shape, device=x.device) >= dropout if mask is None else mask.reshape(flat.shape)
    rows = [None if t is None else t.expand(*lead, 1).reshape(-1, 1) for t in gates or [None] * n]
    own = tuple(float(s) / (1 - dropout) for s in scales)
    ys = LowRank.apply(n, own, flat, mask, *ws, *cs, *downs, *ups, *rows, *(gains or [None] * n))
    return [y.reshape(*lead, y.shape[-1]) for y in ys]
