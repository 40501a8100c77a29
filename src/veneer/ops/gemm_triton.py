"""A frozen linear's own product with a low-rank term in its accumulator, as Triton kernels for GPUs with tensor memory
access (compute capability 9 and up).

    augmented   y  = x Wᵀ + b + z Bᵀ           x (N, K), W (O, K), z (N, r), B (O, r)
    gathered    dx = Σ_i g_i W_i + dz A         g_i (N, O_i), W_i (O_i, K), dz (N, r), A (r, K)

The low-rank term is one more step of the sum that a tile runs anyway, so y and dx are written once and never read again;
the sums over several maps stay in the accumulator as well. One program a multiprocessor walks over tiles of 128 x 256.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BM, BN, BK, GROUP = 128, 256, 64, 8  # on an H100 as fast as its library's products at 2048 to 14336 features


@triton.jit
def _at(t, tm, tn, GROUP: tl.constexpr):
    """Row and column of tile t: columns within groups of rows, so that neighbours share what the cache holds."""
    first = t // (GROUP * tn) * GROUP
    rows = min(tm - first, GROUP)
    inside = t % (GROUP * tn)
    return first + inside % rows, inside // rows


@triton.jit
def _augmented(
    x, w, z, b, bias, out, M, N, K, R: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
        for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
            acc = tl.dot(z.load([m, r]), b.load([n, r]).T, acc)
        if BIAS:
            o = n + tl.arange(0, BN)
            acc += tl.load(bias + o, o < N, 0.0).to(tl.float32)[None, :]
        out.store([m, n], acc.to(out.dtype))


@triton.jit
def _gathered(
    g0, g1, g2, w0, w1, w2, dz, a, out, M, N, K0, K1, K2, COUNT: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K0, BK):
            acc = tl.dot(g0.load([m, k]), w0.load([k, n]), acc)
        if COUNT > 1:
            for k in range(0, K1, BK):
                acc = tl.dot(g1.load([m, k]), w1.load([k, n]), acc)
        if COUNT > 2:
            for k in range(0, K2, BK):
                acc = tl.dot(g2.load([m, k]), w2.load([k, n]), acc)
        if R:
            for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
                acc = tl.dot(dz.load([m, r]), a.load([r, n]), acc)
        out.store([m, n], acc.to(out.dtype))


@cache
def _multiprocessors(device: Any) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _programs(m: int, n: int, bm: int, bn: int, device: Any) -> tuple[tuple[int], int]:
    """The grid of a walk over the tiles (bm, bn) of an (m, n) result, and how far a program's tiles lie apart."""
    apart = _multiprocessors(device)
    return (min(apart, triton.cdiv(m, bm) * triton.cdiv(n, bn)),), apart


def _of(t: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor map of t, which must begin at a multiple of 16 bytes: what does not is a part of another tensor."""
    return TensorDescriptor.from_tensor(t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format), block)


def augmented(x: Tensor, w: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    (m, k), n, r = x.shape, w.shape[0], z.shape[1]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid, sms = _programs(m, n, BM, BN, x.device)
    _augmented[grid](
        _of(x, [BM, BK]), _of(w, [BN, BK]), _of(z, [BM, 16]), _of(b, [BN, 16]), bias, _of(out, [BM, BN]), m, n, k,
        r, bias is not None, BM, BN, BK, GROUP, sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def gathered(gs: list[Tensor], ws: list[Tensor], dz: Tensor | None, a: Tensor | None) -> Tensor:
    m, n = gs[0].shape[0], ws[0].shape[1]
    out = torch.empty((m, n), dtype=gs[0].dtype, device=gs[0].device)
    g = [_of(t, [BM, BK]) for t in gs]
    w = [_of(t, [BK, BN]) for t in ws]
    low = (_of(dz, [BM, 16]), _of(a, [16, BN])) if dz is not None and a is not None else (None, None)
    spare = [None] * (3 - len(gs))
    sizes = [t.shape[1] for t in gs] + [0] * len(spare)
    grid, sms = _programs(m, n, BM, BN, out.device)
    _gathered[grid](
        *g, *spare, *w, *spare, *low, _of(out, [BM, BN]), m, n, *sizes, len(gs), 0 if dz is None else dz.shape[1], BM, BN, BK, GROUP, sms,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


# -- as operators that a compiler leaves alone; defined for GPUs alone, since nothing else calls them ----------------------
_lib = torch.library.Library("veneer_gemm", "DEF")
_lib.define("augmented(Tensor x, Tensor w, Tensor? bias, Tensor z, Tensor b) -> Tensor")
_lib.define("gathered(Tensor[] gs, Tensor[] ws, Tensor? dz, Tensor? a) -> Tensor")
_lib.impl("augmented", augmented, "CUDA")
_lib.impl("gathered", gathered, "CUDA")


@torch.library.register_fake("veneer_gemm::augmented", lib=_lib)
def _(x: Any, w: Any, bias: Any, z: Any, b: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.register_fake("veneer_gemm::gathered", lib=_lib)
def _(gs: Any, ws: Any, dz: Any, a: Any) -> Tensor:
    return gs[0].new_empty(gs[0].shape[0], ws[0].shape[1])
