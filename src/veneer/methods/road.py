"""RoAd: pairs of outputs are rotated and scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class RoAd(Method):
    """Rotary adaptation in 2D (Liao and Monz, NeurIPS 2024, arXiv 2409.00119).

        y = R (W x + b),   for each pair:  y_i = α cos θ · h_i - α sin θ · h_j,   y_j = α sin θ · h_i + α cos θ · h_j

    The outputs are cut into groups; in each the first half is paired with the second, as in Hugging Face PEFT.

    at        any maps but expert tensors; default 'linear' (the paper's)
    variant   1: one α and θ for a pair; 2: one for each of the four entries' rows; 4: one for each of the four entries
    group     outputs in a group; 64 by default, as in PEFT, or all of them where 64 does not divide their number

    α = 1 and θ = 0 at the start. Parameters: out for each map (variants 2 and 4: 2 out, 4 out). Merges; costs two products
    of vectors. Raises: PlanError for a group that is odd, does not divide the outputs, or
    mixes those of a grouped convolution's groups.
    """

    name = "road"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2409.00119"
    mergeable = True
    default_at = "linear"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    variant: int = 1
    group: int | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 4) or isinstance(self.variant, bool):
            raise self._fail(f"variant is 1, 2 or 4, not {self.variant!r}")
        if self.group is not None:
            self._positive(group=self.group)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        group = self.group or (64 if site.out % 64 == 0 else site.out)
        if group % 2 or site.out % group:
            raise self._fail(f"a group of {group} is odd, or does not divide the {site.out} outputs of {site.path}", "Give group=… an even divisor")
        return RoadPart(site, build, self.variant, group)


class RoadPart(MapPart):
    """dy = (R - 1) h."""

    def __init__(self, site: Site, build: Build, variant: int, group: int) -> None:
        super().__init__(site, build)
        apart = site.out // getattr(self.map, "groups", 1)
        if apart % group:
            raise PlanError(
                f"RoAd: a group of {group} mixes outputs of the convolution's groups of {apart}, which have other inputs", where=site.path,
                fix="Give group=… an even divisor of those, or leave it out: at='…,!name:…'",
            )  # fmt: skip
        self.variant, self.group = variant, group
        n = {1: site.out // 2, 2: site.out, 4: 2 * site.out}[variant]
        self.theta = nn.Parameter(torch.zeros(n, **like(build, site)))
        self.alpha = nn.Parameter(torch.ones(n, **like(build, site)))

    def columns(self) -> tuple[Tensor, Tensor]:
        """What h and its turned half are multiplied by, each (out)."""
        theta, alpha = self.theta, self.alpha
        if self.variant == 4:
            theta, alpha = (t.reshape(-1, 2, self.group) for t in (theta, alpha))
            return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
        if self.variant == 1:
            theta, alpha = (t.reshape(-1, self.group // 2).repeat(1, 2).flatten() for t in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def turned(self, h: Tensor, dim: int) -> Tensor:
        """h with the halves of every group exchanged, the new first ones negative."""
        first, second = h.unflatten(dim, (-1, 2, self.group // 2)).unbind(dim + 1)
        return torch.stack((-second, first), dim + 1).flatten(dim, dim + 2)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        straight, cross = (self.map.features(self.cast(v, h), h) for v in self.columns())
        dim = self.map.out_dim % h.dim()
        return (straight - 1) * h + cross * self.turned(h, dim)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        straight, cross = (v.to(w.dtype) for v in self.columns())
        dw = (straight - 1)[:, None] * w + cross[:, None] * self.turned(w, 0)
        return dw, None if b is None else (straight - 1) * b + cross * self.turned(b, 0)

    def scale_by(self, c: float) -> bool:
        if self.variant == 4:  # its two scales are apart, so a scaled rotation need not be one
            return False
        with torch.no_grad():
            x, y = 1 + c * (self.alpha * self.theta.cos() - 1), c * self.alpha * self.theta.sin()
            self.alpha.copy_(torch.hypot(x, y))
            self.theta.copy_(torch.atan2(y, x))
        return True
