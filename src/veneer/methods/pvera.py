"""PVeRA: VeRA whose latent values are drawn, while training, from a distribution that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.maps import Map
from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, kaiming, with_bank
from .part import Part, like


@dataclass(frozen=True)
class PVeRA(Method):
    """Probabilistic vector-based random matrix adaptation (Fillioux et al., WACV 2026, arXiv 2512.07703).

        y = W x + b0 + b ⊙ B z,   z = μ + exp(λ / 2) ⊙ ε,   [μ; λ] = d ⊙ A x,   ε ~ N(0, 1) for every token
        A (2 r, in), B (out, r) frozen and shared, d (2 r), b (out) trained

    While training z is drawn; afterwards z = μ, which is linear in x, and so merges.

    at        linears, HF Conv1D, convolutions and embeddings; default 'attn.{q,v}'. Maps of other sizes take the leading rows
              and columns of A and B
    r         256 by default (the paper's)
    start     d's first value; 0.1 by default, as in Hugging Face PEFT
    dropout   on x before A, while training; 0 by default
    sample    draw z afterwards too, as for confidence intervals; off by default. Then it does not merge
    kl        weight of the mean over tokens and latents of KL(N(μ, exp λ) ‖ N(0, 1)) = (μ² + exp λ - 1 - λ) / 2 in vn.penalty;
              0 by default, as in PEFT (the authors' code divides their sum by 1e6 to 1e16, chosen for each data set)

    b is zero at the start; A and B ~ Kaiming uniform, and are saved once for all maps. Parameters: 2 r + out a map.
    Raises: PlanError; CapabilityError on merging with `sample`.
    """

    name = "pvera"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2512.07703"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding")
    rate = (1e-3, "PVeRA, the highest of 1e-3 to 1e-5 that its authors try")

    r: int = 256
    start: float = 0.1
    dropout: float = 0.0
    sample: bool = False
    kl: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._finite(start=self.start, kl=self.kl)
        if self.kl < 0:
            raise self._fail(f"kl must not be negative, as {self.kl!r} is")
        self._share(dropout=self.dropout)
        self._bool(sample=self.sample)
        self._pattern()
        object.__setattr__(self, "mergeable", not self.sample)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            wide, tall = max(s.inp for s in chosen), max(s.out for s in chosen)
            made = Projections(build, A=(2 * self.r, wide), B=(tall, self.r))
            kaiming(made.A, wide, math.sqrt(2))
            kaiming(made.B, self.r, math.sqrt(2))
            return made

        yield from with_bank(self, sites, build, bank)

    def part(self, site: Site, build: Build) -> Part:
        part = PVeRAPart(site, build, self)
        if part.map.read_by_others:
            raise self._fail(f"the weight of {site.path!r} is read without a call of it, where nothing can be drawn", "Leave it out of `at`")
        return part


class PVeRAPart(LowRankPart):
    factors = None  # type: ignore[assignment]  # the product of two factors draws nothing

    def __init__(self, site: Site, build: Build, m: PVeRA) -> None:
        super().__init__(site, build)
        self.d = nn.Parameter(torch.full((2 * m.r,), m.start, **like(build, site)))
        self.b = nn.Parameter(torch.zeros(site.out, **like(build, site)))
        self.r, self.dropout, self.sample, self.kl = m.r, m.dropout, m.sample, m.kl
        self.divergence: Tensor | None = None  # of the last call in training

    def latent(self, rows: int) -> Tensor:
        """The leading `rows` of d ⊙ A: r give μ, 2 r also λ."""
        return self.d[:rows, None] * self.shared("A")[:rows, : self.site.inp]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.latent(self.r), self.b[:, None] * self.shared("B")[: self.site.out]

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not (self.training or self.sample):
            return super().deviation(x, h)
        z = self.map.down(self.entry(x), self.cast(self.latent(2 * self.r), h))
        dim = self.map.out_dim % z.dim()
        mu, log = (t.flatten(dim, dim + 1) for t in z.unflatten(dim, (-1, 2, self.r)).unbind(dim + 1))  # a grouped convolution has several
        if self.kl and self.training:
            m, v = mu.float(), log.float()
            self.divergence = self.kl * 0.5 * (m * m + v.exp() - 1 - v).mean()
        return self.map.up(mu + (log / 2).exp() * torch.randn_like(mu), self.cast(self.pair()[1], h))

    def penalty(self) -> Tensor | None:
        found, self.divergence = self.divergence, None
        return found

    def reads_weight(self) -> bool:
        return False

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair()
        return m.up(m.down(x, self.cast(b, h).t()), self.cast(a, h).t())

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "b")
