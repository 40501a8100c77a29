"""Products with a frozen matrix in 8-bit floating point (float8_e4m3), forward and for the input's gradient.

    y = W x ≈ s_x s_W ⊙ (q(x) q(W)ᵀ)         q(v) = round_e4m3(v / s),  s = max|v| / 448, one s for each row of v

Rows are tokens for x and dy, and for W the dimension that the product keeps: outputs forward, inputs for dx = dy W. The
scale then leaves the sum, so the product is one call, and each token has the full range whatever its neighbours hold. A
frozen W is quantised once, in both layouts; x and dy are in every call, by operations that a compiler fuses into what made
them. There is no dW, and x is not kept.

e4m3 has 3 bits of mantissa: an element is off by up to 6%, a product of random numbers by about 3.7% of its norm.
Shapes: x (…, in), W (out, in); in and out must be multiples of 16 on a GPU. Row-wise scales: Micikevicius et al., FP8
formats for deep learning, arXiv 2209.05433 for the format; torch._scaled_mm for the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fresh import fresh

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # a row of zeros has this for its largest magnitude
MULTIPLE = 16  # of both dimensions of W, for the tensor cores


class Quantised(NamedTuple):
    """q(W) (out, in) with a scale for each row, (out, 1); and q(Wᵀ) (in, out) with (in, 1)."""

    w: Tensor
    s: Tensor
    wt: Tensor
    st: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """q(x) and the scales (…, 1) in fp32, for each row along the last dimension. A row with NaN or inf becomes NaN."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=LEAST)
    return (x.float() * (LARGEST / largest)).to(DTYPE), largest / LARGEST


def quantised(w: Tensor) -> Quantised:
    """Both layouts of a W (out, in)."""
    w = w.detach()
    return Quantised(*rows(w.contiguous()), *rows(w.t().contiguous()))


def product(q: Tensor, s: Tensor, w: Tensor, sw: Tensor, dtype: torch.dtype) -> Tensor:
    """(s q) (s_w w)ᵀ (N, out) in `dtype`, for q (N, in), w (out, in) in e4m3. On a CPU the same sums in fp32."""
    if q.device.type == "cpu":
        return ((q.float() @ w.float().t()) * s * sw.t()).to(dtype)
    # row-wise scales give bf16 only
    return torch._scaled_mm(q, w.t(), scale_a=s, scale_b=sw.t(), out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)


class FrozenProduct(torch.autograd.Function):
    """(x (N, in), dtype, *Quantised) -> y (N, out); the gradient is for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, w: Tensor, s: Tensor, wt: Tensor, st: Tensor) -> Tensor:
        ctx.save_for_backward(wt, st)
        ctx.dtype = x.dtype
        return fresh(product(*rows(x), w, s, dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        wt, st = ctx.saved_tensors
        return product(*rows(g), wt, st, ctx.dtype), None, None, None, None, None


def linear(x: Tensor, w: Quantised, b: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """W x + b for x (…, in), in `dtype` (default x's)."""
    y = FrozenProduct.apply(x.reshape(-1, x.shape[-1]), dtype or x.dtype, *w).reshape(*x.shape[:-1], w.w.shape[0])
    return y if b is None else y + b.to(y.dtype)


def reference(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same, written plainly in fp32: round to the nearest that e4m3 has, multiply. Its gradient is not ours: dy is exact."""

    def rounded(v: Tensor) -> Tensor:
        scale = v.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
        return (v / scale).to(DTYPE).to(v.dtype) * scale

    return torch.nn.functional.linear(rounded(x.float()), rounded(w.float()), None if b is None else b.float()).to(x.dtype)
