"""Uni-LoRA: all numbers of all factors are copies of the numbers of one short vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, check_rank, lead, with_bank
from .part import Part, like


@dataclass(frozen=True)
class UniLoRA(Method):
    """Uni-LoRA: one vector is all you need (Li et al., NeurIPS 2025, arXiv 2506.00799).

        y = W x + b + B A x,   every entry of every A (r, in) and B (out, r) is θ_j / sqrt(n_j) for a random, fixed j

    with θ (length) trained, and n_j how often θ_j is used: LoRA's D numbers are P θ for an isometry P (Pᵀ P = I), so that
    distances between adapters are those between their θ.

    at        any maps; default 'attn.{q,v}'
    r         4 by default; length 256 by default (both PEFT's; the paper: 4, and 23,040 for the GLUE tasks)
    bound     θ ~ U(-bound, bound); 0.02 by default
    dropout   on x before A, while training; 0 by default

    The indices are dealt out evenly, each j as often as any other or once more. They are saved, as 32-bit integers, so
    that the file is larger than what was trained. Neither factor is zero at the start, so the output is not quite the
    base's, as in the paper. Parameters: `length` altogether. Raises: PlanError for a rank above a matrix's, or a vector
    longer than the numbers it fills.
    """

    name = "unilora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2506.00799"
    mergeable = True
    identity_at_init = False
    default_at = "attn.{q,v}"

    r: int = 4
    length: int = 256
    bound: float = 0.02
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, length=self.length)
        self._finite(bound=self.bound)
        self._share(dropout=self.dropout)
        self._pattern()
        if self.bound <= 0:
            raise self._fail(f"bound must be positive, not {self.bound!r}")

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            made = Projections(build, trained=("theta",), theta=(self.length,), norm=(self.length,))
            with torch.no_grad():
                made.theta.uniform_(-self.bound, self.bound)
            return made

        made = list(with_bank(self, sites, build, bank))
        if not build.blank:
            self._deal(made[0][1], [p for _, p in made[1:]])
        yield from made

    def _deal(self, bank: Part, parts: list[Part]) -> None:
        """Give every entry its index."""
        holes = [t for p in parts for t in (p.index_A, p.index_B)]
        count = sum(t.numel() for t in holes)
        if self.length > count:
            raise self._fail(f"length={self.length} is over the {count} numbers that the factors have here", f"Use length={count} or less")
        even = torch.arange(count, dtype=torch.int32) % self.length
        for t, mine in zip(holes, even[torch.randperm(count)].split([t.numel() for t in holes]), strict=True):
            t.copy_(mine.reshape(t.shape))
        bank.norm.copy_(torch.bincount(even, minlength=self.length).to(bank.norm.dtype).rsqrt())

    def part(self, site: Site, build: Build) -> Part:
        check_rank("UniLoRA", self.r, site)
        return UniLoRAPart(site, build, self)


class UniLoRAPart(LowRankPart):
    index_A: Tensor
    index_B: Tensor

    def __init__(self, site: Site, build: Build, m: UniLoRA) -> None:
        super().__init__(site, build)
        new = {**like(build, site), "dtype": torch.int32}
        self.frozen("index_A", torch.zeros(*lead(site), m.r, site.inp, **new))
        self.frozen("index_B", torch.zeros(*lead(site), site.out, m.r, **new))
        self.dropout = m.dropout

    def pair(self) -> tuple[Tensor, Tensor]:
        entries = self.shared("theta") * self.shared("norm")
        return nn.functional.embedding(self.index_A, entries.unsqueeze(1)).squeeze(-1), nn.functional.embedding(self.index_B, entries.unsqueeze(1)).squeeze(-1)
