"""Decoding with routed adapters in Triton: one token a row, so the factors are read once and that is all the time it takes.

    z[t] = A[e] x[t]      d[t, o] = Σ_j B[e, o, j] z[t, m r + j],   e = index[t // per],  m the map that output o belongs to

A program of the first kernel has some rows of one slot's A, one of the second some rows of its B: both read whole lines of
memory, and there are enough programs to fill the card. Sums are in fp32. x (N, in); A (E, M r, in); B (E, Σ out, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: ops.routed does without
    triton = None

if triton is not None:

    @triton.jit
    def low_kernel(x, a, index, z, width, ranks, per, indexed: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
        t, j = tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R)
        e = t // per
        if indexed:
            e = tl.load(index + e)
        k = tl.arange(0, K)
        rows = a + e.to(tl.int64) * ranks * width + j[:, None] * width
        total = tl.zeros((R, K), tl.float32)
        for start in range(0, width, K):
            at = start + k
            inside = at < width
            v = tl.load(x + t * width + at, mask=inside, other=0.0)
            w = tl.load(rows + at[None, :], mask=(j < ranks)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
            total += w.to(tl.float32) * v.to(tl.float32)[None, :]
        tl.store(z + t * ranks + j, tl.sum(total, 1).to(z.dtype.element_ty), mask=j < ranks)

    @triton.jit
    def up_kernel(z, b, index, d, out, rank, ranks, per, first, second, indexed: tl.constexpr, BO: tl.constexpr, BJ: tl.constexpr):
        t, o = tl.program_id(0), tl.program_id(1) * BO + tl.arange(0, BO)
        e = t // per
        if indexed:
            e = tl.load(index + e)
        j = tl.arange(0, BJ)
        m = (o >= first).to(tl.int32) + (o >= second).to(tl.int32)
        inside = (o < out)[:, None] & (j < rank)[None, :]
        w = tl.load(b + e.to(tl.int64) * out * rank + o[:, None] * rank + j[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(z + t * ranks + m[:, None] * rank + j[None, :], mask=inside, other=0.0)
        tl.store(d + t * out + o, tl.sum(w.to(tl.float32) * v.to(tl.float32), 1).to(d.dtype.element_ty), mask=o < out)


def gemv(x: Tensor, a: Tensor, b: Tensor, index: Tensor | None, outs: list[int]) -> Tensor:
    """d (N, Σ out), the deviations of up to three maps with outs[m] outputs each."""
    n, (_, ranks, width), (_, out, rank) = x.shape[0], a.shape, b.shape
    per = n // (a.shape[0] if index is None else index.shape[0])
    z, d = x.new_empty(n, ranks), x.new_empty(n, out)
    at: Any = a if index is None else index
    R, K, BO = SIZES
    low_kernel[(n, triton.cdiv(ranks, R))](x, a, at, z, width, ranks, per, index is not None, R, K, num_warps=4)
    first = outs[0] if len(outs) > 1 else out
    second = outs[0] + outs[1] if len(outs) > 2 else out
    up_kernel[(n, triton.cdiv(out, BO))](z, b, at, d, out, rank, ranks, per, first, second, index is not None, BO, triton.next_power_of_2(rank), num_warps=4)
    return d


SIZES = (4, 1024, 256)
kernels: Any = triton
trusted = False  # set by ops/trust.py, where there is a GPU
EAGER = False  # a product of torch's is launched faster from Python


def fits(x: Tensor, groups: int, maps: int) -> bool:
    """Whether the kernels are the way for x: a GPU, a token or so for each group of rows, and no gradient."""
    if not trusted or not x.is_cuda or maps > 3 or x.requires_grad or not (EAGER or torch.compiler.is_compiling()):
        return False
    return x.numel() <= 4 * groups * x.shape[-1] and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
