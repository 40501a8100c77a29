"""VeRA: frozen random projections that all maps share, and two trained vectors a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, kaiming, lead, with_bank
from .part import Part, like


@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation (Kopiczko et al., ICLR 2024, arXiv 2310.11454).

        y = W x + b0 + b ⊙ B (d ⊙ A x),   A (r, in), B (out, r) frozen and shared, d (r), b (out) trained

    at        any maps; default 'attn.{q,v}' (the paper's). Maps of other sizes take the leading rows and columns of A and B
    r         256 by default, as in the paper's larger runs; it costs r parameters a map, and no more
    start     d's first value; 0.1 by default (the paper's)
    dropout   on x before A, while training; 0 by default

    b is zero at the start; A and B ~ Kaiming uniform. They are saved once for all maps, so that no random generator has to
    be the same elsewhere. Parameters: r + out a map. Raises: PlanError.
    """

    name = "vera"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2310.11454"
    mergeable = True
    default_at = "attn.{q,v}"
    rate = (4e-3, "VeRA, 4e-3 to 1e-2 on GLUE (Kopiczko et al. 2024)")

    r: int = 256
    start: float = 0.1
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._finite(start=self.start)
        self._share(dropout=self.dropout)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            wide, tall = max(s.inp for s in chosen), max(s.out for s in chosen)
            made = Projections(build, A=(self.r, wide), B=(tall, self.r))
            kaiming(made.A, wide, math.sqrt(2))
            kaiming(made.B, self.r, math.sqrt(2))
            return made

        yield from with_bank(self, sites, build, bank)

    def part(self, site: Site, build: Build) -> Part:
        return VeRAPart(site, build, self)


class VeRAPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: VeRA) -> None:
        super().__init__(site, build)
        self.d = nn.Parameter(torch.full((*lead(site), m.r), m.start, **like(build, site)))
        self.b = nn.Parameter(torch.zeros(*lead(site), site.out, **like(build, site)))
        self.dropout = m.dropout

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = self.shared("A")[:, : self.site.inp], self.shared("B")[: self.site.out]
        return self.d.unsqueeze(-1) * a, self.b.unsqueeze(-1) * b

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "b")
