"""Frozen linears whose rows have low-rank terms of their own, in the accumulator of the products (compute capability 9 and up).

    augmented   y  = x Wᵀ + c + z B_eᵀ            x (N, K), W (O, K), z (N, r), B a part of (E, Σ O, r)
    gathered    dx = Σ_i g_i W_i + dz A_e          g_i (N, O_i), W_i (O_i, K), dz (N, r), A (E, r, K)

N / S neighbouring rows make a group, and group g has the factors of slot e = index[g]. A tile's 128 rows are all of one group,
so that the low-rank term is one more step of the sum that the tile runs anyway: y and dx are written once and never read again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_triton import BK, BM, BN, GROUP, _at, _of, _programs


@triton.jit
def _augmented(
    x, w, z, b, bias, index, out, M, N, K, per, start, stride, R: tl.constexpr, BIAS: tl.constexpr, INDEXED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        e = m // per
        if INDEXED:
            e = tl.load(index + e).to(tl.int32)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
        for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
            acc = tl.dot(z.load([m, r]), b.load([e * stride + start + n, r]).T, acc)
        if BIAS:
            o = n + tl.arange(0, BN)
            acc += tl.load(bias + o, o < N, 0.0).to(tl.float32)[None, :]
        out.store([m, n], acc.to(out.dtype))


@triton.jit
def _gathered(
    g0, g1, g2, w0, w1, w2, dz, a, index, out, M, N, K0, K1, K2, per, COUNT: tl.constexpr, R: tl.constexpr, INDEXED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        e = m // per
        if INDEXED:
            e = tl.load(index + e).to(tl.int32)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K0, BK):
            acc = tl.dot(g0.load([m, k]), w0.load([k, n]), acc)
        if COUNT > 1:
            for k in range(0, K1, BK):
                acc = tl.dot(g1.load([m, k]), w1.load([k, n]), acc)
        if COUNT > 2:
            for k in range(0, K2, BK):
                acc = tl.dot(g2.load([m, k]), w2.load([k, n]), acc)
        for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
            acc = tl.dot(dz.load([m, r]), a.load([e * R + r, n]), acc)
        out.store([m, n], acc.to(out.dtype))


def augmented(x: Tensor, w: Tensor, bias: Tensor | None, z: Tensor, b: Tensor, start: int, index: Tensor | None) -> Tensor:
    """y for the map whose B is the rows start … start + O of b (E, Σ O, r)."""
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    (grid, sms), groups = _programs(m, n, BM, BN, x.device), b.shape[0] if index is None else index.shape[0]
    _augmented[grid](
        _of(x, [BM, BK]), _of(w, [BN, BK]), _of(z, [BM, 16]), _of(b.flatten(0, 1), [BN, 16]), bias, index, _of(out, [BM, BN]), m, n, k,
        m // groups, start, b.shape[1], z.shape[1], bias is not None, index is not None, BM, BN, BK, GROUP, sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def gathered(gs: list[Tensor], ws: list[Tensor], dz: Tensor, a: Tensor, index: Tensor | None) -> Tensor:
    m, n = gs[0].shape[0], ws[0].shape[1]
    out = torch.empty((m, n), dtype=gs[0].dtype, device=gs[0].device)
    spare: list[Any] = [None] * (3 - len(gs))
    sizes = [t.shape[1] for t in gs] + [0] * len(spare)
    (grid, sms), groups = _programs(m, n, BM, BN, out.device), a.shape[0] if index is None else index.shape[0]
    _gathered[grid](
        *(_of(t, [BM, BK]) for t in gs), *spare, *(_of(t, [BK, BN]) for t in ws), *spare, _of(dz, [BM, 16]), _of(a.flatten(0, 1), [16, BN]), index,
        _of(out, [BM, BN]), m, n, *sizes, m // groups, len(gs), dz.shape[1], index is not None, BM, BN, BK, GROUP, sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
