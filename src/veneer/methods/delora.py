"""DeLoRA: a LoRA whose strength and angle are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class DeLoRA(Method):
    """Decoupled low-rank adaptation (Bini et al., ICLR 2025, arXiv 2503.18225).

        y = W x + b + (λ / r) · Σ_i b_i a_i^T (n ⊙ x) / (|a_i| |b_i|),   n_j = |W_:,j|

    Each rank-one piece has length 1, so λ alone bounds how far the map can move, in units of the base's own columns n.

    at       linear maps; default 'attn.{q,v}'
    r        8 by default, as in Hugging Face PEFT
    bound    λ's start, learnt with the rest; 15 by default, as in PEFT

    b is zero at the start, and so the deviation (norms count as 1e-4 at least). n is measured once and saved. Parameters:
    r (in + out) + 1 for each map. Raises: PlanError; CapabilityError where the base's weight cannot be had.
    """

    name = "delora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2503.18225"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor")

    r: int = 8
    bound: float = 15.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._finite(bound=self.bound)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        return DeLoRAPart(site, build, self)


class DeLoRAPart(MapPart):
    norm: Tensor

    def __init__(self, site: Site, build: Build, m: DeLoRA) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.A = nn.Parameter(uniform(torch.empty(m.r, site.inp, **new)))
        self.B = nn.Parameter(torch.zeros(site.out, m.r, **new))
        self.bound = nn.Parameter(torch.full((1,), m.bound, **new))
        self.frozen("norm", torch.empty(site.inp, **new) if build.blank else self.weight().to(new["dtype"]).norm(dim=0))

    def rates_of(self) -> Tensor:
        """λ / (r |a_i| |b_i|), (r)."""
        return self.bound / self.A.shape[0] / (self.A.norm(dim=1).clamp(min=1e-4) * self.B.norm(dim=0).clamp(min=1e-4))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a = self.rates_of()[:, None] * self.A * self.norm
        return nn.functional.linear(nn.functional.linear(x, self.cast(a, h)), self.cast(self.B, h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (self.B @ (self.rates_of()[:, None] * self.A * self.norm)).to(w.dtype), None

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.bound.mul_(c)
        return True
