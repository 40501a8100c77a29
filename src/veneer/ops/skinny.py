"""Products with one skinny side, r ≪ d: what a low-rank part adds to a frozen linear.

    narrow(x, a, s)            s x aᵀ               (N, K), (r, K)                        -> (N, r)
    outer(x, z)                xᵀ z                 (N, K), (N, r)                        -> (K, r)
    both(g, z, b)              g b and gᵀ z         (N, O), (N, r), (O, r)                -> (N, r), (O, r)
    augmented(x, w, c, z, b)   x wᵀ + c + z bᵀ      (N, K), (O, K), (O,), (N, r), (O, r)  -> (N, O)
    gathered(gs, ws, dz, a)    Σ g_i w_i + dz a     (N, O_i), (O_i, K), (N, r), (r, K)    -> (N, K)

Written here in plain torch, z as a view of (r, N). On a GPU in half precision the kernels of skinny_triton.py make the first three, each in one pass
over its large operand, and where the products are large those of gemm_triton.py the last two, with the low-rank term in the
accumulator: a library's products would write y and dx, read them and write them again. The kernels' gradients of small
factors are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fresh import fresh
from .products import add_, linear

ROWS, NUMBERS = 512, 1 << 20  # below, a product is too small to fill a GPU with its tiles


thin: Any = None  # the kernels' modules, where there is a GPU for them
gemm: Any = None
if torch.cuda.is_available():
    try:
        from . import gemm_triton as gemm
        from . import skinny_triton as thin
    except ImportError:  # torch without Triton
        pass
    else:
        # tensor maps
        if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (9, 0):
            gemm = None


def _plain(t: Tensor) -> bool:
    """Rows of numbers that lie side by side, as kernels read them."""
    return t.is_cuda and t.dtype in (torch.bfloat16, torch.float16) and t.stride(-1) == 1


def _thin(*ts: Tensor) -> Any:
    return thin if thin is not None and all(_plain(t) for t in ts) else None


def _gemm(ws: Sequence[Tensor], *ts: Tensor | None) -> Any:
    """The operators with the low-rank term in the accumulator, where they take these operands and pay."""
    given = [*ws, *(t for t in ts if t is not None)]
    if gemm is None or not all(_plain(t) for t in given) or min(w.numel() for w in ws) < NUMBERS or given[len(ws)].shape[0] < ROWS:
        return None
    # a tensor map's rows, and the columns of z that are one map's, begin at multiples of 16 bytes
    return torch.ops.veneer_gemm if all(t.stride(0) % 8 == 0 and t.shape[1] % 8 == 0 for t in given) else None


def narrow(x: Tensor, a: Tensor, s: float) -> Tensor:
    k = _thin(x, a)
    if k is not None:
        return k.narrow(x, a, s)
    # a library's product with few rows is up to twice as fast as the same one with few columns: so the tokens lie side by side in z
    z = (a @ x.t()).t()
    return z if s == 1 else z * s


def outer(x: Tensor, z: Tensor) -> Tensor:
    k = _thin(x, z)
    return linear(z.t(), x.t()).t() if k is None else k.outer(x, z)


def both(g: Tensor, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    k = _thin(g, z, b)
    return (narrow(g, b.t(), 1), outer(g, z)) if k is None else k.both(g, z, b)


def beside(zs: Sequence[Tensor]) -> Tensor:
    """[z_1, z_2, …] (N, Σ r_i), laid out as they are."""
    if len(zs) == 1:
        return zs[0]
    return torch.cat(list(zs), 1) if zs[0].stride(1) == 1 else torch.cat([z.t() for z in zs]).t()


def augmented(x: Tensor, w: Tensor, c: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    k = _gemm([w], x, z, b)
    return fresh(linear(x, w, c).addmm_(z, b.t())) if k is None else k.augmented(x, w, c, z, b)


def gathered(gs: Sequence[Tensor], ws: Sequence[Tensor], dz: Tensor | None, a: Tensor | None) -> Tensor:
    k = _gemm(ws, *gs, dz, a) if len(gs) <= 3 else None
    if k is not None:
        return k.gathered(list(gs), list(ws), dz, a)
    dx = linear(gs[0], ws[0].t())
    for g, w in zip(gs[1:], ws[1:], strict=True):
        add_(dx, g, w.t())
    return dx if dz is None or a is None else dx.addmm_(dz, a)
