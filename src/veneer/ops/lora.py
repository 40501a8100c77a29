"""Frozen linears with low-rank deviations, forward and backward in as few passes over the activations as torch allows.

    y_i = x W_iᵀ + b_i + s_i · (x' A_iᵀ) B_iᵀ      for the maps i that share the input x;  x' is x, or x after dropout

The bytes decide, not the arithmetic: with rank r ≪ d each skinny product costs one trip over x, y or dy. So
- z = x' [A_1; A_2; …]ᵀ is one product for all maps, and it is kept (r numbers a token) along with x, once;
- B's product is added onto W's own result in place, and A's onto dx: no separate sum, no second full-size tensor;
- there is no dW, and dx of all the maps is accumulated where it is.

Under torch.compile the two functions are opaque operators, since a compiler would turn in-place products back into a
product and a sum. Shapes: x (N, in), W_i (out_i, in), A_i (r_i, in), B_i (out_i, r_i); z (N, Σ r_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor, dropped: Tensor | None, ws: Sequence[Tensor], bs: Sequence[Tensor | None], downs: Sequence[Tensor], ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The same, written plainly."""
    low = x if dropped is None else dropped
    return [F.linear(x, w, b) + s * F.linear(F.linear(low, a), u) for w, b, a, u, s in zip(ws, bs, downs, ups, scales, strict=True)]


def forward(
    x: Tensor, dropped: Tensor | None, ws: list[Tensor], bs: list[Tensor | None], downs: list[Tensor], ups: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """[y_1, …, z] for x (N, in)."""
    low = x if dropped is None else dropped
    z = low @ _stack(downs).t()
    out, start = [], 0
    for w, b, u, s in zip(ws, bs, ups, scales, strict=True):
        y = F.linear(x, w, b)
        out.append(y.addmm_(z[:, start : start + u.shape[1]], u.t(), alpha=s))
        start += u.shape[1]
    return [*out, z]


def backward(
    gs: list[Tensor], x: Tensor, z: Tensor, ws: list[Tensor], downs: list[Tensor], ups: list[Tensor], scales: list[float],
    dropout: bool, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    """[dA_1…n (stacked), dB_1, …, then dx, dx' where asked for] for gs = [dy_1, …]; `x` is what A was applied to.

    There is a dx' only with dropout; without it dx has both terms.
    """
    dz = torch.empty_like(z)
    dups, start = [], 0
    for g, u, s in zip(gs, ups, scales, strict=True):
        r = u.shape[1]
        part = g @ u
        dz[:, start : start + r] = part if s == 1 else part.mul_(s)
        # g's transpose is taken on the skinny side: (r, N) x (N, out)
        du = z[:, start : start + r].t() @ g
        dups.append((du if s == 1 else du.mul_(s)).t().contiguous())
        start += r
    out = [dz.t() @ x, *dups]
    if not need_x:
        return out
    dx = gs[0] @ ws[0]
    for g, w in zip(gs[1:], ws[1:], strict=True):
        dx.addmm_(g, w)
    if dropout:
        return [*out, dx, dz @ _stack(downs)]
    return [*out, dx.addmm_(dz, _stack(downs))]


def _stack(ts: list[Tensor]) -> Tensor:
    return ts[0] if len(ts) == 1 else torch.cat(ts)


# -- the same two as operators that a compiler leaves alone -----------------------------------------------------------
@torch.library.custom_op(
    "veneer::low_rank_forward", mutates_args=(),
    schema="(Tensor x, Tensor? dropped, Tensor[] ws, Tensor?[] bs, Tensor[] downs, Tensor[] ups, float[] scales) -> Tensor[]",
)  # fmt: skip
def _forward_op(
    x: Tensor, dropped: Tensor | None, ws: list[Tensor], bs: list[Tensor | None], downs: list[Tensor], ups: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return forward(x, dropped, ws, bs, downs, ups, scales)


@_forward_op.register_fake
def _(x: Any, dropped: Any, ws: Any, bs: Any, downs: Any, ups: Any, scales: Any) -> list[Tensor]:
    n = x.shape[0]
    return [*(x.new_empty(n, w.shape[0]) for w in ws), x.new_empty(n, sum(u.shape[1] for u in ups))]


@torch.library.custom_op(
    "veneer::low_rank_backward", mutates_args=(),
    schema="(Tensor[] gs, Tensor x, Tensor z, Tensor[] ws, Tensor[] downs, Tensor[] ups, float[] scales, bool dropout, bool need_x) -> Tensor[]",
)  # fmt: skip
def _backward_op(
    gs: list[Tensor], x: Tensor, z: Tensor, ws: list[Tensor], downs: list[Tensor], ups: list[Tensor], scales: list[float],
    dropout: bool, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    return backward(gs, x, z, ws, downs, ups, scales, dropout, need_x)


@_backward_op.register_fake
def _(gs: Any, x: Any, z: Any, ws: Any, downs: Any, ups: Any, scales: Any, dropout: Any, need_x: Any) -> list[Tensor]:
    full = [torch.empty_like(x) for _ in range((1 + dropout) * need_x)]
    return [x.new_empty(sum(a.shape[0] for a in downs), x.shape[1]), *(x.new_empty(u.shape) for u in ups), *full]


class LowRank(torch.autograd.Function):
    """(n, scales, x, dropped, *W, *b, *A, *B) -> y_1, …, y_n. W and b are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx: Any, n: int, scales: tuple[float, ...], x: Tensor, dropped: Tensor | None, *tensors: Any) -> Any:
        ws, bs, downs, ups = (list(tensors[i * n : (i + 1) * n]) for i in range(4))
        op = _forward_op if torch.compiler.is_compiling() else forward
        *ys, z = op(x, dropped, ws, bs, downs, ups, list(scales))
        ctx.n, ctx.scales, ctx.dropout = n, scales, dropped is not None
        ctx.need_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if dropped is None else dropped, z, *ws, *downs, *ups)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs: Any) -> Any:
        n = ctx.n
        low, z, *rest = ctx.saved_tensors
        ws, downs, ups = rest[:n], rest[n : 2 * n], rest[2 * n :]
        # an output that nothing used still has its place in the sums
        full = [g.contiguous() if g is not None else low.new_zeros(low.shape[0], w.shape[0]) for g, w in zip(gs, ws, strict=True)]
        op = _backward_op if torch.compiler.is_compiling() else backward
        ddown, *out = op(full, low, z, list(ws), list(downs), list(ups), list(ctx.scales), ctx.dropout, ctx.need_x)
        ddowns, dups, (dx, dlow) = ddown.split([a.shape[0] for a in downs]), out[:n], (*out[n:], None, None)[:2]
        return None, None, dx, dlow, *[None] * (2 * n), *ddowns, *dups


def low_rank(
    x: Tensor, ws: Sequence[Tensor], bs: Sequence[Tensor | None], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float],
    dropped: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """[y_1, …, y_n], x of any leading shape. All tensors in one dtype; the W_i and b_i must be frozen."""
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    low = None if dropped is None else dropped.reshape(flat.shape)
    ys = LowRank.apply(len(ws), tuple(float(s) for s in scales), flat, low, *ws, *bs, *downs, *ups)
    return [y.reshape(*lead, y.shape[-1]) for y in ys]
