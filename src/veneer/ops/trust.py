"""Whether the kernels of routed batches are right on this machine: tried once, on small inputs, before they are used."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from . import gemv, routed, rows


@cache
def tried(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Switch the kernels on that compile on `device` and give the numbers of their plain forms; warn of the others."""
    for name, module, test in (("decoding", gemv, _decoding), ("row by row products", rows, _products)):
        if module.kernels is None:
            continue
        try:
            error = test(device, dtype)
        except Exception as e:  # a compiler's or a driver's: of any kind
            warnings.warn(f"Triton's kernels for {name} do not run here ({str(e)[:200]}); plain products are used", stacklevel=2)
            continue
        module.trusted = error < 2e-2
        if not module.trusted:
            warnings.warn(f"Triton's kernels for {name} are wrong here, by {error:.1e}; plain products are used", stacklevel=2)


def _new(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def _decoding(device: torch.device, dtype: torch.dtype) -> float:
    x, a, b = _new(device, dtype, (4, 128), (4, 16, 128), (4, 40, 8))
    lows, ups = a.split(8, 1), b.split((24, 16), 1)
    want = [routed.reference(x, x.new_zeros(4, up.shape[1]), low, up, range(4)) for low, up in zip(lows, ups, strict=True)]
    return _error(gemv.gemv(x, a, b, None, [24, 16]), torch.cat(want, 1))


def _products(device: torch.device, dtype: torch.dtype) -> float:
    n = 2 * rows.kernels.BM
    x, w, a, b, g = _new(device, dtype, (n, 128), (256, 128), (2, 16, 128), (2, 256, 16), (n, 256))
    (want,) = rows.reference(x, [w], [None], a, b, [i // rows.kernels.BM for i in range(n)])
    z = torch.bmm(x.unflatten(0, (2, -1)), a.transpose(1, 2)).flatten(0, 1)
    there = _error(rows.kernels.augmented(x, w, None, z, b, 0, None), want)
    back = (g @ w).unflatten(0, (2, -1)).baddbmm(z.unflatten(0, (2, -1)), a).flatten(0, 1)
    return max(there, _error(rows.kernels.gathered([g], [w], z, a, None), back))


def _error(got: Tensor, want: Tensor) -> float:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    return error if error == error else float("inf")
