"""LoHa: dW = s · (B1 A1) ⊙ (B2 A2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class LoHa(Method):
    """Low-rank Hadamard product (FedPara, Hyeon-Woo et al., ICLR 2022, arXiv 2108.06098; as LoHa in LyCORIS, arXiv 2309.14859).

        y = W x + b + s · ((B1 A1) ⊙ (B2 A2)) x,   s = alpha / r,   A1, A2 (r, in), B1, B2 (out, r)

    The product of two matrices of rank r has a rank of up to r², for twice the parameters of LoRA.

    at        any maps; default 'attn.{q,v}'
    r         rank of each factor; 8 by default, as in Hugging Face PEFT
    alpha     numerator of the scale; r by default, so s = 1

    A1, A2 and B1 ~ U(±1/sqrt(columns)), B2 = 0, so the start is the base exactly. Parameters: 2 r (in + out) for each map.
    Raises: PlanError.
    """

    name = "loha"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2108.06098"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 8
    alpha: float | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def part(self, site: Site, build: Build) -> Part:
        return LoHaPart(site, build, self)


class LoHaPart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: LoHa) -> None:
        super().__init__(site, build)
        new = like(build, site)
        lead = (site.experts,) if site.experts else ()
        self.A1, self.A2 = (nn.Parameter(uniform(torch.empty(*lead, m.r, site.inp, **new))) for _ in range(2))
        self.B1 = nn.Parameter(uniform(torch.empty(*lead, site.out, m.r, **new)))
        self.B2 = nn.Parameter(torch.zeros(*lead, site.out, m.r, **new))
        self.scale = 1.0 if m.alpha is None else m.alpha / m.r
        # Below this the product through its r² columns is cheaper than the matrix: T r² (in + out) against T in out
        self.by_factors = m.r * m.r * (site.out + site.inp) < site.out * site.inp

    def delta(self) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.by_factors:
            return super().deviation(x, h)
        # (B1 A1) ⊙ (B2 A2) = B A: the columns of B, and the rows of A, are all r² products of a column (row) of each
        a = (self.A1.unsqueeze(1) * self.A2.unsqueeze(0)).flatten(0, 1)
        b = (self.B1.unsqueeze(2) * self.B2.unsqueeze(1)).flatten(1, 2)
        z = self.map.down(x, self.cast(a, h))
        return self.map.up(z * self.scale if self.scale != 1 else z, self.cast(b, h))

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.B2.mul_(c)
        return True


def uniform(p: Tensor) -> Tensor:
    """p ~ U(±1/sqrt(columns)), torch's own start of a Linear."""
    return nn.init.uniform_(p, -1 / math.sqrt(p.shape[-1]), 1 / math.sqrt(p.shape[-1]))
