"""What sparse methods share: a delta of k entries at fixed places of each map, and how a budget is dealt out to maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..ops.sparse import sparse_product
from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import DeltaPart

LARGEST = 1 << 31  # entries that int32 can number


@dataclass(frozen=True)
class Sparse(Method):
    """Base of the methods that choose k entries of the chosen maps once, and train a delta of those alone.

        y = (W + S) x + b,   S zero but at k places: their numbers (int32) are frozen, their values trained

    `scores` ranks the entries; the rest is the same for all. Not a method itself.
    """

    family = "selective"
    ports = ("weight",)
    mergeable = True
    default_at = "linear"

    share: float = 0.005
    k: int | None = None
    per: str = "model"
    at: str | None = None

    def __post_init__(self) -> None:
        self._finite(share=self.share)
        if not 0 < self.share <= 1:
            raise self._fail(f"share={self.share} of the entries", "Give a number over 0 and up to 1, as 0.005")
        if self.k is not None:
            self._positive(k=self.k)
        self._one_of(("model", "matrix"), per=self.per)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        made = []
        for site in sites(self.at, "weight", self.default_at):
            build.module = module_at(build.model, site.path)
            made.append(self.part(site, build))
        if not build.blank:
            self.choose(made, build)
        for part in made:
            yield part.site, part

    def part(self, site: Site, build: Build) -> SparsePart:
        return SparsePart(site, build)

    def choose(self, parts: list[SparsePart], build: Build) -> None:
        """Give every part its entries: the best of the model, or of each matrix."""
        self.deal(parts, lambda i: self.scores(parts[i], build))

    def scores(self, part: SparsePart, build: Build) -> Tensor:
        """A number for each entry of the part's canonical matrix; the largest are chosen."""
        raise NotImplementedError

    def deal(self, parts: list[Any], scores: Callable[[int], Tensor]) -> None:
        counts = self.counts([p.entries for p in parts], scores)
        for i, (part, n) in enumerate(zip(parts, counts, strict=True)):
            part.hold(scores(i).flatten().topk(n).indices)

    def counts(self, sizes: list[int], scores: Callable[[int], Tensor]) -> list[int]:
        """How many entries each matrix gets, at least 1."""
        if self.per == "matrix":
            return [min(n, self.k or max(1, round(self.share * n))) for n in sizes]
        budget = min(sum(sizes), self.k or max(1, round(self.share * sum(sizes))))
        best, owner = torch.empty(0), torch.empty(0, dtype=torch.int32)
        for i, n in enumerate(sizes):  # one matrix at a time: all scores together may not fit
            own = scores(i).flatten().topk(min(n, budget)).values.float().cpu()
            both = torch.cat([best, own])
            best, at = both.topk(min(budget, len(both)))
            owner = torch.cat([owner, torch.full((len(own),), i, dtype=torch.int32)])[at]
        return torch.bincount(owner, minlength=len(sizes)).clamp(min=1).tolist()


class SparsePart(DeltaPart):
    """index (k) int32, ascending: flat places in the canonical matrix; values (k)."""

    index: Tensor

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.shape = (*([site.experts] if site.experts else []), site.out, site.inp)
        self.entries = site.out * site.inp * max(1, site.experts)
        if self.entries >= LARGEST:
            raise PlanError(f"{self.entries} entries are more than int32 can number", where=site.path, fix="Leave that map out: at='…,!name:…'")
        self.values = nn.Parameter(torch.zeros(0, **like(build, site)))
        self.frozen("index", torch.zeros(0, dtype=torch.int32, device=self.values.device))

    def hold(self, index: Tensor) -> None:
        """Train the entries at `index`, from zero."""
        self.index = index.sort().values.to(self.values.device, torch.int32)
        self.values = nn.Parameter(self.values.new_zeros(len(index)))

    def delta(self) -> Tensor:
        flat = self.values.new_zeros(self.entries).index_copy(0, self.index.long(), self.values)
        return flat.reshape(self.shape)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        return sparse_product(x.to(h.dtype), self.cast(self.values, h), self.index, self.map.out)

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """Take the saved number of entries."""
        index = saved.get("index")
        if index is not None and index.dim() == 1:
            self.index = self.index.new_empty(len(index))
            self.values = nn.Parameter(self.values.new_empty(len(index)))

    def flaw(self) -> str:
        if self.index.is_meta or not len(self.index):
            return ""
        ascending = bool((self.index[1:] > self.index[:-1]).all())
        inside = 0 <= int(self.index[0]) and int(self.index[-1]) < self.entries
        return "" if ascending and inside else f"its places are not among the {self.entries} of the matrix, each once"

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.values.mul_(c)
        return True
