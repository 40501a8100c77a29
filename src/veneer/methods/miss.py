"""MiSS: one shard of dW, repeated along the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class MiSS(Method):
    """Matrix shard sharing (Kang and Yin 2024, arXiv 2409.15371; earlier called Bone).

        y = W x + b + D^T Σ_g x_g,   D (r, out),   x_g the g-th r numbers of x (the last piece filled up with zeros)

    at        any maps; default 'attn.{q,v}'
    r         the shard's height; 64 by default, as in Hugging Face PEFT
    mini      share D along the output too: D is one (r, mini) matrix, repeated; None (default) does not

    D is zero at the start. Parameters: r out for each map (r mini). Raises: PlanError for r over the number of inputs, and
    for a `mini` that does not divide the outputs.
    """

    name = "miss"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2409.15371"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 64
    mini: int | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        if self.mini is not None:
            self._positive(mini=self.mini)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        if self.r > site.inp:
            raise self._fail(f"r={self.r} is over the {site.inp} inputs of {site.path}", f"Use r={site.inp} or less")
        if self.mini is not None and site.out % self.mini:
            raise self._fail(f"mini={self.mini} does not divide the {site.out} outputs of {site.path}")
        return MissPart(site, build, self)


class MissPart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: MiSS) -> None:
        super().__init__(site, build)
        lead = (site.experts,) if site.experts else ()
        self.inp, self.r, self.out = site.inp, m.r, site.out
        self.D = nn.Parameter(torch.zeros(*lead, m.r, m.mini or site.out, **like(build, site)))

    def shard(self) -> Tensor:
        """(out, r)."""
        d = self.D.transpose(-2, -1)
        return d if d.shape[-2] == self.out else torch.cat([d] * (self.out // d.shape[-2]), -2)

    def delta(self) -> Tensor:
        pieces = -(-self.inp // self.r)
        return torch.cat([self.shard()] * pieces, -1)[..., : self.inp]

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        x = nn.functional.pad(x, (0, -self.inp % self.r)).unflatten(-1, (-1, self.r)).sum(-2)
        return nn.functional.linear(x, self.cast(self.shard(), h))

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.D.mul_(c)
        return True
