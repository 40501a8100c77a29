"""Norm tuning: scale and shift of the norms get a delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..sites import Site
from .base import Build, Method
from .bitfit import DeltaPart
from .part import Part


@dataclass(frozen=True)
class NormTuning(Method):
    """Tuning of the norms alone (LN tuning, Zhao et al., ICLR 2024, arXiv 2312.11420).

        y = (γ + δγ) ⊙ norm(x) + (β + δβ)

    at   which norms; default 'norm', all of them

    The deltas are zero at the start. Parameters: one or two vectors a norm. They ride in the base's own operation: no cost.
    Raises: SiteError for a model without norms.
    """

    name = "norm"
    family = "selective"
    ports = ("param",)
    paper = "arXiv 2312.11420"
    mergeable = True
    default_at = "norm"

    at: str | None = None

    def __post_init__(self) -> None:
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        for site in sites(self.at, "param", self.default_at):
            yield site, DeltaPart(site, build)
