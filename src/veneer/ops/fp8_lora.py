"""Frozen linears in float8_e4m3 with low-rank deviations, in one operation: ops/lora.py on the base of ops/fp8.py.

    y_i = s_x s_Wi ⊙ (q(x) q(W_i)ᵀ) + c_i + s_i · (x' A_iᵀ) B_iᵀ      for the maps i that share x;  x' is x, or x after dropout

x is quantised once for all maps, and so is each dy for its dx; A and B read x and dy themselves, so that what is trained has their
own precision. vn.optimize(base_compute="fp8") takes it where fuse=True asks for it (docs/performance.md: 1.1 times the compiler's form). The kernels of
fp8_triton.py, with the low-rank term in the accumulator, are used for sizes where `measured` found them right and faster.

Shapes: x (N, in), A_i (r_i, in), B_i (out_i, r_i); W_i as fp8.Quantised has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fp8
from .fp8 import Quantised
from .fresh import fresh
from .skinny import ROWS, beside, both, narrow, outer

kernels: Any = None
if torch.cuda.is_available() and min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) >= (9, 0):
    try:
        from . import fp8_triton as kernels
    except ImportError:  # torch without Triton
        kernels = None

faster: dict[tuple[str, int, tuple[int, ...], int], bool] = {}  # (which, in, outs, r) -> what `measured` found


def reference(
    x: Tensor, dropped: Tensor | None, ws: Sequence[Quantised], cs: Sequence[Tensor | None], downs: Sequence[Tensor], ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The same, written plainly."""
    low = x if dropped is None else dropped
    return [fp8.linear(x, w, c) + s * ((low @ a.t()) @ u.t()) for w, c, a, u, s in zip(ws, cs, downs, ups, scales, strict=True)]


def takes(which: str, n: Any, inp: int, outs: tuple[int, ...], r: int, dtype: torch.dtype) -> bool:
    """Whether the kernel `which` is for these sizes."""
    return kernels is not None and dtype == torch.bfloat16 and not (isinstance(n, int) and n < ROWS) and faster.get((which, inp, outs, r), False)


def augmented(q: Tensor, s: Tensor, w: Quantised, c: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    """s s_W ⊙ (q Wᵀ) + c + z Bᵀ."""
    if takes("augmented", q.shape[0], q.shape[1], (w.w.shape[0],), b.shape[1], z.dtype):
        return torch.ops.veneer_fp8.augmented(q, s, w.w, w.s, c, z.contiguous() if z.stride(1) != 1 else z, b)
    y = fp8.product(q, s, w.w, w.s, z.dtype)
    if c is not None:
        y = y + c.to(y.dtype)
    return fresh(y.addmm_(z, b.t()))


def gathered(gs: Sequence[Tensor], ws: Sequence[Quantised], dz: Tensor | None, a: Tensor | None) -> Tensor:
    """Σ dy_i W_i, each dy quantised by itself; and dz A, where there is a dz."""
    made = [fp8.rows(g) for g in gs]
    outs = tuple(g.shape[1] for g in gs)
    if dz is not None and a is not None and takes("gathered", gs[0].shape[0], a.shape[1], outs, a.shape[0], dz.dtype):
        qs, ss = ([pair[i] for pair in made] for i in (0, 1))
        return torch.ops.veneer_fp8.gathered(qs, ss, [w.wt for w in ws], [w.st for w in ws], dz.contiguous(), a)
    dx = fp8.product(*made[0], ws[0].wt, ws[0].st, gs[0].dtype)
    for (q, s), w in zip(made[1:], ws[1:], strict=True):
        dx += fp8.product(q, s, w.wt, w.st, gs[0].dtype)
    return dx if dz is None or a is None else dx.addmm_(dz, a)


class LowRank8(torch.autograd.Function):
    """(n, scales, x, dropped, *c, *A, *B, *(w, s, wt, st) of each W) -> y_1, …, y_n. W and c are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx: Any, n: int, scales: tuple[float, ...], x: Tensor, dropped: Tensor | None, *tensors: Any) -> Any:
        cs, downs, ups = (tensors[i * n : (i + 1) * n] for i in range(3))
        ws = [Quantised(*tensors[i : i + 4]) for i in range(3 * n, 7 * n, 4)]
        low = x if dropped is None else dropped
        if len(set(scales)) == 1:
            zs = narrow(low, _stack(downs), scales[0]).split([a.shape[0] for a in downs], 1)
        else:
            zs = [narrow(low, a, s) for a, s in zip(downs, scales, strict=True)]
        q, s = fp8.rows(x)
        ys = [augmented(q, s, w, c, z, u) for w, c, z, u in zip(ws, cs, zs, ups, strict=True)]
        ctx.n, ctx.scales, ctx.dropout = n, scales, dropped is not None
        ctx.need_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(low, *zs, *downs, *ups, *(t for w in ws for t in (w.wt, w.st)))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs: Any) -> Any:
        n = ctx.n
        low, *rest = ctx.saved_tensors
        zs, downs, ups = (rest[i * n : (i + 1) * n] for i in range(3))
        ws = [Quantised(wt, st, wt, st) for wt, st in zip(rest[3 * n :: 2], rest[3 * n + 1 :: 2], strict=True)]  # the first two are not needed
        # an output that nothing used still has its place in the sums
        full = [g.contiguous() if g is not None else low.new_zeros(low.shape[0], w.wt.shape[1]) for g, w in zip(gs, ws, strict=True)]
        dzs, dups = [], []
        for g, z, u, s in zip(full, zs, ups, ctx.scales, strict=True):
            dz, du = both(g, z, u)
            dzs.append((dz if s == 1 else dz * s).to(low.dtype))
            dups.append(du)
        dz, dx, dlow = beside(dzs), None, None
        ddown = outer(low, dz).t()
        if ctx.need_x and ctx.dropout:
            dx, dlow = gathered(full, ws, None, None), dz @ _stack(downs)
        elif ctx.need_x:
            dx = gathered(full, ws, dz, _stack(downs))
        return None, None, dx, dlow, *[None] * n, *ddown.split([a.shape[0] for a in downs]), *dups, *[None] * (4 * n)


def _stack(ts: Sequence[Tensor]) -> Tensor:
    return ts[0] if len(ts) == 1 else torch.cat(list(ts))


def low_rank(
    x: Tensor, ws: Sequence[Quantised], cs: Sequence[Tensor | None], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float],
    dropped: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """[y_1, …, y_n], x of any leading shape. All but the W_i in one dtype; the W_i and c_i must be frozen."""
    lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    low = None if dropped is None else dropped.reshape(flat.shape)
    ys = LowRank8.apply(len(ws), tuple(float(s) for s in scales), flat, low, *cs, *downs, *ups, *(t for w in ws for t in w))
    return [y.reshape(*lead, y.shape[-1]) for y in ys]


# -- whether the kernels pay: asked at warm-up --------------------------------------------------------------------------
def measured(device: torch.device, sizes: Iterable[tuple[int, tuple[int, ...], int]], n: int = 4096, dtype: torch.dtype = torch.bfloat16) -> None:
    """Find out on `device`, for maps (in, outs, rank of each) that share an input, whether the kernels give the plain form's numbers
    for n rows, and sooner."""
    for inp, outs, r in sizes:
        trials = [("augmented", (out,), r) for out in outs] + [("gathered", outs, r * len(outs))]
        for which, some, ranks in trials:
            key = which, inp, some, ranks
            if kernels is None or key in faster or r % 8 or len(outs) > 3:
                continue
            try:
                ours, plain = _trial(device, dtype, n, *key)
                want = plain().float()
                error = float((ours().float() - want).norm() / want.norm())
                faster[key] = error < 2e-2 and _seconds(ours) < _seconds(plain)
            except Exception as e:  # a compiler's or a driver's: of any kind
                warnings.warn(f"Triton's fp8 kernels do not run here ({str(e)[:200]}); plain products are used", stacklevel=2)
                return


def _trial(device: torch.device, dtype: torch.dtype, n: int, which: str, inp: int, outs: tuple[int, ...], r: int) -> list[Callable[[], Tensor]]:
    """The kernel and the plain form on random numbers."""
    g = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    ws = [fp8.quantised(new(out, inp)) for out in outs]
    if which == "augmented":
        (w,), z, b, (q, s) = ws, new(n, r), new(outs[0], r), fp8.rows(new(n, inp))
        return [lambda: kernels.augmented(q, s, w.w, w.s, None, z, b), lambda: fp8.product(q, s, w.w, w.s, dtype).addmm_(z, b.t())]
    dz, a, made = new(n, r), new(r, inp), [fp8.rows(new(n, out)) for out in outs]
    qs, ss = ([pair[i] for pair in made] for i in (0, 1))

    def plain() -> Tensor:
        first, *rest = (fp8.product(q, s, w.wt, w.st, dtype) for (q, s), w in zip(made, ws, strict=True))
        for t in rest:
            first += t
        return first.addmm_(dz, a)

    return [lambda: kernels.gathered(qs, ss, [w.wt for w in ws], [w.st for w in ws], dz, a), plain]


def _seconds(call: Callable[[], Any]) -> float:
    """The least of ten calls on a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(13):
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[3:])
