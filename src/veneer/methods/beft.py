"""BEFT: a bias is added to one projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class BEFT(Method):
    """Bias-efficient fine-tuning (Huang et al. 2025, arXiv 2509.15974).

        y = W x + b + δ

    Of all biases those of the value projection do most of the work; unlike vn.BitFit this needs no bias in the base.

    at   any maps; default 'attn.v' (the paper's)

    δ is zero at the start. Parameters: out for each map. Merges, making a bias where there was none. Raises: PlanError.
    """

    name = "beft"
    family = "selective"
    ports = ("weight",)
    paper = "arXiv 2509.15974"
    mergeable = True
    default_at = "attn.v"
    kinds = ("linear", "transposed", "conv")

    at: str | None = None

    def __post_init__(self) -> None:
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        return BEFTPart(site, build)


class BEFTPart(MapPart):
    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.delta = nn.Parameter(torch.zeros(site.out, **like(build, site)))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.features(self.cast(self.delta, h), h).expand_as(h)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(w), self.delta.to(w.dtype)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.delta.mul_(c)
        return True
