"""LoKr: dW = s · W1 ⊗ W2, a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class LoKr(Method):
    """Low-rank Kronecker product (Edalati et al. 2022, arXiv 2212.10650; as LoKr in LyCORIS, arXiv 2309.14859).

        y = W x + b + s · (W1 ⊗ W2) x,   s = alpha / r,   W1 (a, c), W2 (b, d),   out = a b,  in = c d

    W2 = W2b W2a of rank r, unless r is half of its larger side or more: then W2 itself (and with decompose_both W1 too).

    at             any maps; default 'attn.{q,v}'. A convolution's kernel is part of d
    r              rank; 8 by default, as in Hugging Face PEFT
    alpha          numerator of the scale; r by default, so s = 1
    factor         a and c are this, where it divides out and in; else the largest divisors up to it that bring both
                   sides nearer each other. -1 (default): as square as possible
    decompose_both W1 = W1b W1a of rank r too, where r is under half of its larger side; off by default

    W1 (or W1b) is zero, so the start is the base exactly. Parameters: a c + r (b + d) for each map.
    Raises: PlanError.
    """

    name = "lokr"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2212.10650"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 8
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        if self.factor != -1:
            self._positive(factor=self.factor)
        self._bool(decompose_both=self.decompose_both)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def part(self, site: Site, build: Build) -> Part:
        return LoKrPart(site, build, self)


class LoKrPart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: LoKr) -> None:
        super().__init__(site, build)
        new = like(build, site)
        lead = (site.experts,) if site.experts else ()
        kernel = math.prod(getattr(self.map, "kernel", ()))
        (a, b), (c, d) = divisors(site.out, m.factor), divisors(site.inp // kernel, m.factor)
        self.sizes = a, b, c, d * kernel
        low1, low2 = m.decompose_both and m.r < max(a, c) / 2, m.r < max(b, d) / 2
        # names in the order of a product: w1 = w1_a w1_b
        if low1:
            self.w1_a = nn.Parameter(torch.zeros(*lead, a, m.r, **new))
            self.w1_b = nn.Parameter(uniform(torch.empty(*lead, m.r, c, **new)))
        else:
            self.w1 = nn.Parameter(torch.zeros(*lead, a, c, **new))
        if low2:
            self.w2_a = nn.Parameter(uniform(torch.empty(*lead, b, m.r, **new)))
            self.w2_b = nn.Parameter(uniform(torch.empty(*lead, m.r, d * kernel, **new)))
        else:
            self.w2 = nn.Parameter(uniform(torch.empty(*lead, b, d * kernel, **new)))
        self.low = low1, low2
        self.scale = 1.0 if m.alpha is None else m.alpha / m.r

    def first(self) -> Tensor:
        return self.w1_a @ self.w1_b if self.low[0] else self.w1

    def delta(self) -> Tensor:
        w2 = self.w2_a @ self.w2_b if self.low[1] else self.w2
        w1 = self.scale * self.first()
        return (w1[..., :, None, :, None] * w2[..., None, :, None, :]).flatten(-4, -3).flatten(-2, -1)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        # (W1 ⊗ W2) x = W1 X W2^T for x as a (c, d) matrix: two small products, and no (out, in) matrix
        z = x.unflatten(-1, (self.sizes[2], self.sizes[3]))
        if self.low[1]:
            z = nn.functional.linear(nn.functional.linear(z, self.cast(self.w2_b, h)), self.cast(self.w2_a, h))
        else:
            z = nn.functional.linear(z, self.cast(self.w2, h))
        return (self.cast(self.scale * self.first(), h) @ z).flatten(-2, -1)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            (self.w1_a if self.low[0] else self.w1).mul_(c)
        return True


def divisors(n: int, factor: int) -> tuple[int, int]:
    """n = p q with p <= q unless p is `factor` itself: p = factor where that divides n, else the largest divisor of n up to
    factor (-1: no bound) and to sqrt(n)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    p = next(p for p in range(most, 0, -1) if n % p == 0)
    return p, n // p
