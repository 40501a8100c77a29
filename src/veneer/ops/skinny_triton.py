"""Products with one skinny side, as Triton kernels: what a low-rank part adds to a frozen linear.

    narrow(x, a, s)    s x aᵀ            (N, K), (R, K)          -> (N, R), in x's dtype
    outer(x, z)        xᵀ z              (N, K), (N, R)          -> (K, R), in fp32
    both(g, z, b)      g b and gᵀ z      (N, P), (N, R), (P, R)  -> (N, R), (P, R), in fp32, in one pass over g

With R ≪ K, P each is bound by one pass over its large operand; a library's general product makes the pass at a half to a
third of the memory's rate, or two passes of it. Sums run in fp32 and in an order that does not change from run to run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# -- kernels: tiles (BN rows, BK columns), the narrow side whole in BR >= R columns --------------------------------------


@triton.jit
def _narrow(x, a, out, scale, N, K, R, sx, sa, KS, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """out[split, n, r] = scale Σ_k x[n, k] a[r, k] over the split's k."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    r = tl.arange(0, BR)
    acc = tl.zeros((BN, BR), tl.float32)
    for k0 in range(split * KS, min(K, split * KS + KS), BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + n[:, None].to(tl.int64) * sx + k[None, :], (n < N)[:, None] & (k < K)[None, :], 0.0)
        az = tl.load(a + r[None, :] * sa + k[:, None], (r < R)[None, :] & (k < K)[:, None], 0.0)
        acc += tl.dot(xs, az, input_precision="ieee")
    at = out + split.to(tl.int64) * N * R + n[:, None].to(tl.int64) * R + r[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), (n < N)[:, None] & (r < R)[None, :])


@triton.jit
def _outer(x, z, out, N, K, R, sx, sz, NS, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """out[split, k, r] = Σ_n x[n, k] z[n, r] over the split's n."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    r = tl.arange(0, BR)
    acc = tl.zeros((BK, BR), tl.float32)
    for n0 in range(split * NS, min(N, split * NS + NS), BN):
        n = n0 + tl.arange(0, BN)
        xs = tl.load(x + n[:, None].to(tl.int64) * sx + k[None, :], (n < N)[:, None] & (k < K)[None, :], 0.0)
        zs = tl.load(z + n[:, None] * sz + r[None, :], (n < N)[:, None] & (r < R)[None, :], 0.0)
        acc += tl.dot(tl.trans(xs), zs, input_precision="ieee")
    at = out + split.to(tl.int64) * K * R + k[:, None] * R + r[None, :]
    tl.store(at, acc, (k < K)[:, None] & (r < R)[None, :])


@triton.jit
def _both(g, z, b, zout, bout, N, P, R, sg, sz, sb, NS, BN: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr):
    """zout[strip, n, r] = Σ_o g[n, o] b[o, r] over the strip's o; bout[split, o, r] = Σ_n g[n, o] z[n, r] over the split's n."""
    strip, split = tl.program_id(0), tl.program_id(1)
    o = strip * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    bs = tl.load(b + o[:, None] * sb + r[None, :], (o < P)[:, None] & (r < R)[None, :], 0.0)
    acc = tl.zeros((BO, BR), tl.float32)
    for n0 in range(split * NS, min(N, split * NS + NS), BN):
        n = n0 + tl.arange(0, BN)
        gs = tl.load(g + n[:, None].to(tl.int64) * sg + o[None, :], (n < N)[:, None] & (o < P)[None, :], 0.0)
        zs = tl.load(z + n[:, None] * sz + r[None, :], (n < N)[:, None] & (r < R)[None, :], 0.0)
        acc += tl.dot(tl.trans(gs), zs, input_precision="ieee")
        dz = tl.dot(gs, bs, input_precision="ieee")
        tl.store(zout + (strip.to(tl.int64) * N + n[:, None]) * R + r[None, :], dz, (n < N)[:, None] & (r < R)[None, :])
    tl.store(bout + (split.to(tl.int64) * P + o[:, None]) * R + r[None, :], acc, (o < P)[:, None] & (r < R)[None, :])


# -- launches: as operators that a compiler can look into -----------------------------------------------------------------
# Tokens may be of any number, and a compiler's symbol: only the other sizes decide how the work is split.


def _pad(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _splits(most: int, n: Any, rows: int) -> int:
    """In how many parts n tokens are summed, where that is known."""
    return max(1, min(most, -(-n // (2 * rows))) if isinstance(n, int) else most)


def _kernel(k: Any) -> Any:
    return wrap_triton(k) if not os.environ.get("TRITON_INTERPRET") else k


@triton_op("veneer::narrow", mutates_args={})
def narrow(x: Tensor, a: Tensor, s: float) -> Tensor:
    n, k = x.shape
    r, bn = a.shape[0], 64
    bk = 256 if r <= 64 else 64
    # few tokens are too few programs for a GPU, so that k is cut as well
    splits = max(1, min(132 // -(-n // bn), k // (2 * bk))) if isinstance(n, int) else 1
    out = torch.empty((splits, n, r), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    share = -(-k // (splits * bk)) * bk
    _kernel(_narrow)[(triton.cdiv(n, bn), splits)](x, a, out, s, n, k, r, x.stride(0), a.stride(0), share, bn, bk, _pad(r), num_warps=4, num_stages=3)
    return out.squeeze(0) if splits == 1 else out.sum(0).to(x.dtype)


@triton_op("veneer::outer", mutates_args={})
def outer(x: Tensor, z: Tensor) -> Tensor:
    n, k = x.shape
    r, bn, bk = z.shape[1], 128 if z.shape[1] <= 64 else 64, 64
    splits = _splits(264 // -(-k // bk), n, bn)
    out = torch.empty((splits, k, r), dtype=torch.float32, device=x.device)
    share = triton.cdiv(triton.cdiv(n, splits), bn) * bn
    _kernel(_outer)[(triton.cdiv(k, bk), splits)](x, z, out, n, k, r, x.stride(0), z.stride(0), share, bn, bk, _pad(r), num_warps=4, num_stages=4)
    return out.sum(0)


@triton_op("veneer::both", mutates_args={})
def both(g: Tensor, z: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n, o = g.shape
    r, bn = z.shape[1], 64
    bo = 256 if r <= 64 else 128 if r <= 128 else 64  # a program holds bo x r sums
    strips = -(-o // bo)
    splits = _splits(264 // strips, n, bn)
    zout = torch.empty((strips, n, r), dtype=torch.float32, device=g.device)
    bout = torch.empty((splits, o, r), dtype=torch.float32, device=g.device)
    share = triton.cdiv(triton.cdiv(n, splits), bn) * bn
    _kernel(_both)[(strips, splits)](g, z, b, zout, bout, n, o, r, g.stride(0), z.stride(0), b.stride(0), share, bn, bo, _pad(r), num_warps=4, num_stages=3)
    return zout.sum(0), bout.sum(0)
