"""RandLoRA: a full-rank change as a sum of random low-rank ones that are scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, check_rank, kaiming, lead, with_bank
from .part import Part, like


@dataclass(frozen=True)
class RandLoRA(Method):
    """RandLoRA (Albert et al., ICLR 2025, arXiv 2502.00987).

        y = W x + b + s · Σ_j B_j Λ_j A Γ_j x,   s = alpha / r,   j = 1 … n,   n = ceil(min(in, out) / r)

    A (r, min) and B_j (max, r) are random, frozen, and shared by all maps (in the other order where out < in); the diagonals
    Λ_j (r) and Γ_j (min) are trained. The sum has full rank, so r trades parameters against compute, and not rank.

    at        linear maps and experts; default 'attn.{q,v}'
    r         32 by default: the smaller, the more parameters
    alpha     20 r by default (both PEFT's)
    dropout   on x before the change, while training; 0 by default

    Λ is zero at the start, Γ = 1 / max of its sizes; A and B have standard deviation 1, and are saved once for all maps.
    Parameters: n (r + min(in, out)) a map. Raises: PlanError for r over the matrix's rank.
    """

    name = "randlora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2502.00987"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor", "experts")

    r: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._share(dropout=self.dropout)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            small, large = max(min(s.inp, s.out) for s in chosen), max(max(s.inp, s.out) for s in chosen)
            made = Projections(build, A=(self.r, 1, small), B=(large, math.ceil(small / self.r), self.r))
            if not build.blank:
                for t in (made.A, made.B):
                    t.div_(kaiming(t, 1).std())
            return made

        yield from with_bank(self, sites, build, bank)

    def part(self, site: Site, build: Build) -> Part:
        check_rank("RandLoRA", self.r, site)
        return RandLoRAPart(site, build, self)


class RandLoRAPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: RandLoRA) -> None:
        super().__init__(site, build)
        new, self.least = like(build, site), min(site.inp, site.out)
        self.n = math.ceil(self.least / m.r)
        self.lambdas = nn.Parameter(torch.zeros(*lead(site), m.r, self.n, **new))
        self.gammas = nn.Parameter(torch.full((*lead(site), self.n, self.least), 1 / max(self.n, self.least), **new))
        self.scale, self.dropout = 20.0 if m.alpha is None else m.alpha / m.r, m.dropout

    def pair(self) -> tuple[Tensor, Tensor]:
        # The trained diagonals scale the smaller side. Which columns of B meet which rows of A is as arbitrary as their
        # numbers; this order is PEFT's, so that its files are the same function.
        small = (self.lambdas.unsqueeze(-1) * self.shared("A")[..., : self.least] * self.gammas.unsqueeze(-3)).flatten(-3, -2)
        large = self.shared("B")[: max(self.site.inp, self.site.out), : self.n].flatten(1)
        return (small, large) if self.site.inp == self.least else (large.t(), small.mT)

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "lambdas")
