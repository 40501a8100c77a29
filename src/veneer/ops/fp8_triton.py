"""Products with a frozen matrix in float8_e4m3 that have a low-rank term in their accumulator, as Triton kernels (compute
capability 9 and up). Timed in docs/performance.md.

    augmented   y  = s s_W ⊙ (q Wᵀ) + c + z Bᵀ                     q (N, K), s (N, 1), W (O, K), s_W (O, 1), z (N, r), B (O, r)
    gathered    dx = Σ_i s_i s_Wi ⊙ (q_i W_iᵀ) + dz A              q_i (N, O_i), W_i (K, O_i), dz (N, r), A (r, K)

q and W are in e4m3 with a scale for each of their rows; what is low-rank is in the dtype of the result. The scales leave a map's
sum when it is complete, so several maps need a second accumulator, and half the columns a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_triton import BM, BN, GROUP, _at, _of, _programs

BK = 128  # bytes, as wide as a row of shared memory


@triton.jit
def _scaled(acc, s, sw, m, n, M, N, BM: tl.constexpr, BN: tl.constexpr):
    i, j = m + tl.arange(0, BM), n + tl.arange(0, BN)
    return acc * tl.load(s + i, i < M, 0.0)[:, None] * tl.load(sw + j, j < N, 0.0)[None, :]


@triton.jit
def _augmented(
    q, s, w, sw, z, b, bias, out, M, N, K, R: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(q.load([m, k]), w.load([n, k]).T, acc)
        acc = _scaled(acc, s, sw, m, n, M, N, BM, BN)
        for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
            acc = tl.dot(z.load([m, r]), b.load([n, r]).T, acc)
        if BIAS:
            o = n + tl.arange(0, BN)
            acc += tl.load(bias + o, o < N, 0.0).to(tl.float32)[None, :]
        out.store([m, n], acc.to(out.dtype))


@triton.jit
def _gathered(
    q0, q1, q2, s0, s1, s2, w0, w1, w2, t0, t1, t2, dz, a, out, M, N, K0, K1, K2, COUNT: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SMS: tl.constexpr,
):  # fmt: skip
    tm, tn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tm * tn, SMS, flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        i, j = _at(t, tm, tn, GROUP)
        m, n = i * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K0, BK):
            acc = tl.dot(q0.load([m, k]), w0.load([n, k]).T, acc)
        total = _scaled(acc, s0, t0, m, n, M, N, BM, BN)
        if COUNT > 1:
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, K1, BK):
                acc = tl.dot(q1.load([m, k]), w1.load([n, k]).T, acc)
            total += _scaled(acc, s1, t1, m, n, M, N, BM, BN)
        if COUNT > 2:
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, K2, BK):
                acc = tl.dot(q2.load([m, k]), w2.load([n, k]).T, acc)
            total += _scaled(acc, s2, t2, m, n, M, N, BM, BN)
        for r in tl.static_range(0, R, 16):  # pyright: ignore[reportGeneralTypeIssues]
            total = tl.dot(dz.load([m, r]), a.load([r, n]), total)
        out.store([m, n], total.to(out.dtype))


def augmented(q: Tensor, s: Tensor, w: Tensor, sw: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    (m, k), n, r = q.shape, w.shape[0], z.shape[1]
    out = torch.empty((m, n), dtype=z.dtype, device=q.device)
    grid, sms = _programs(m, n, BM, BN, q.device)
    _augmented[grid](
        _of(q, [BM, BK]), s, _of(w, [BN, BK]), sw, _of(z, [BM, 16]), _of(b, [BN, 16]), bias, _of(out, [BM, BN]), m, n, k,
        r, bias is not None, BM, BN, BK, GROUP, sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def gathered(qs: list[Tensor], ss: list[Tensor], ws: list[Tensor], ts: list[Tensor], dz: Tensor, a: Tensor) -> Tensor:
    (m, count), n = (qs[0].shape[0], len(qs)), ws[0].shape[0]
    out = torch.empty((m, n), dtype=dz.dtype, device=dz.device)
    bn = BN if count == 1 else BN // 2
    spare: list[Any] = [None] * (3 - count)
    sizes = [q.shape[1] for q in qs] + [0] * len(spare)
    grid, sms = _programs(m, n, BM, bn, dz.device)
    _gathered[grid](
        *(_of(q, [BM, BK]) for q in qs), *spare, *ss, *spare, *(_of(w, [bn, BK]) for w in ws), *spare, *ts, *spare, _of(dz, [BM, 16]), _of(a, [16, bn]),
        _of(out, [BM, bn]), m, n, *sizes, count, dz.shape[1], BM, bn, BK, GROUP, sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


# -- as operators that a compiler leaves alone -----------------------------------------------------------------------------
_lib = torch.library.Library("veneer_fp8", "DEF")
_lib.define("augmented(Tensor q, Tensor s, Tensor w, Tensor sw, Tensor? bias, Tensor z, Tensor b) -> Tensor")
_lib.define("gathered(Tensor[] qs, Tensor[] ss, Tensor[] ws, Tensor[] ts, Tensor dz, Tensor a) -> Tensor")
_lib.impl("augmented", augmented, "CUDA")
_lib.impl("gathered", gathered, "CUDA")


@torch.library.register_fake("veneer_fp8::augmented", lib=_lib)
def _(q: Any, s: Any, w: Any, sw: Any, bias: Any, z: Any, b: Any) -> Tensor:
    return z.new_empty(q.shape[0], w.shape[0])


@torch.library.register_fake("veneer_fp8::gathered", lib=_lib)
def _(qs: Any, ss: Any, ws: Any, ts: Any, dz: Any, a: Any) -> Tensor:
    return dz.new_empty(qs[0].shape[0], ws[0].shape[0])
