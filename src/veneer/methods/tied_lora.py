"""Tied-LoRA: one trained pair of matrices for all maps, and two trained vectors a map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, kaiming, lead, with_bank
from .part import Part, like


@dataclass(frozen=True)
class TiedLoRA(Method):
    """Tied-LoRA (Renduchintala et al., NAACL 2024, arXiv 2311.09578; its TL6).

        y = W x + b0 + s · v ⊙ B (u ⊙ A x),   A (r, in), B (out, r) trained and shared, u (r), v (out) trained

    at        any maps; default 'attn.{q,v}'. Maps of other sizes take the leading rows and columns of A and B (the paper
              ties maps of one size, its fused qkv)
    r         8 by default (the paper: 2 to 128)
    alpha     s = alpha / r; 2 r by default, as LoRA here
    vectors   train u and v; without them (False: the paper's TL2) all maps get the same change
    dropout   on x before A, while training; 0 by default

    B is zero at the start, u and v are one. Parameters: r (in + out) once, and r + out a map. Raises: PlanError.
    """

    name = "tied-lora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2311.09578"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 8
    alpha: float | None = None
    vectors: bool = True
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._share(dropout=self.dropout)
        self._bool(vectors=self.vectors)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            wide, tall = max(s.inp for s in chosen), max(s.out for s in chosen)
            made = Projections(build, trained=("A", "B"), A=(self.r, wide), B=(tall, self.r))
            with torch.no_grad():
                kaiming(made.A, wide)
            return made

        yield from with_bank(self, sites, build, bank)

    def part(self, site: Site, build: Build) -> Part:
        return TiedLoRAPart(site, build, self)


class TiedLoRAPart(LowRankPart):
    u: Tensor
    v: Tensor

    def __init__(self, site: Site, build: Build, m: TiedLoRA) -> None:
        super().__init__(site, build)
        for name, size in (("u", m.r), ("v", site.out)):
            ones = torch.ones(*lead(site), size, **like(build, site))
            if m.vectors:
                self.register_parameter(name, nn.Parameter(ones))
            else:
                self.frozen(name, ones)
        self.scale = 2.0 if m.alpha is None else m.alpha / m.r
        self.dropout = m.dropout

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = self.shared("A")[:, : self.site.inp], self.shared("B")[: self.site.out]
        return self.u.unsqueeze(-1) * a, self.v.unsqueeze(-1) * b

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "v")
