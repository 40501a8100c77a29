"""The part of LoRA and of what is built on it: factors A and B, and the frozen ones of a shifted start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build
from .lowrank import LowRankPart, check_rank
from .part import like

if TYPE_CHECKING:
    from .lora import LoRA


class LoRAPart(LowRankPart):
    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor
    still: set[str]  # of A and B, what is never trained
    new: dict[str, Any]

    def __init__(self, site: Site, build: Build, m: LoRA) -> None:
        super().__init__(site, build)
        check_rank(type(m).__name__, m.r, site)
        start = m.starts[m.init]
        self.scale, self.dropout = m.scale(build), m.dropout
        if m.b_rate != 1:
            self.rates = {"B": m.b_rate}  # type: ignore[misc]
        self.__dict__["still"] = {*start.frozen, *(("A",) if m.freeze_a else ())}
        self.shifted, self.elastic = start.shifted, start.ranks
        self.__dict__["new"] = like(build, site)
        self.hold(m.r)

    def hold(self, r: int) -> None:
        """Make room for rank r: zeros."""
        lead = (self.site.experts,) if self.site.experts else ()
        for name, shape in (("A", (*lead, r, self.site.inp)), ("B", (*lead, self.site.out, r))):
            self._parameters.pop(name, None)
            zeros = torch.zeros(shape, **self.new)
            if name in self.still:
                self.frozen(name, zeros)
            else:
                self.register_parameter(name, nn.Parameter(zeros))
            if self.shifted:
                self.frozen(f"{name}0", torch.zeros(shape, **self.new))

    def begin(self, a: Tensor, b: Tensor) -> None:
        """Start from these factors."""
        for name, value in (("A", a), ("B", b)):
            getattr(self, name).copy_(value)
            if self.shifted:
                getattr(self, f"{name}0").copy_(value)

    def unfold(self, saved: dict[str, Any]) -> None:
        """Take the rank of the file, where ranks were dealt out by data."""
        a = saved.get("A")
        if not self.elastic or a is None or a.dim() < 2 or a.shape[-2] == self.A.shape[-2]:
            return
        if 1 <= a.shape[-2] <= min(self.site.out, self.site.inp):
            self.hold(a.shape[-2])

    def pair(self) -> tuple[Tensor, Tensor]:
        if not self.shifted:
            return self.A, self.B
        # in one product, so that what cancels does so in the accumulator and not between two rounded results
        return torch.cat([self.A, self.A0], -2), torch.cat([self.B, -self.B0], -1)

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "B", *(("B0",) if self.shifted else ()))
