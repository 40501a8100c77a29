"""HiRA: dW = W ⊙ (B A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class HiRA(Method):
    """Hadamard high-rank adaptation (Huang et al., ICLR 2025, OpenReview TwJrTz9cRS).

        y = (W + W ⊙ (B A)) x + b,   A (r, in), B (out, r)

    The base's own high rank is kept in dW, at LoRA's number of parameters.

    at   any maps but expert tensors; default 'attn.{q,v}'
    r    32 by default, as in Hugging Face PEFT

    B is zero at the start. Parameters: r (in + out) for each map. dW has no cheaper form than itself, so a step makes one
    (out, in) matrix for each map and a packed base is unpacked for it. Raises: PlanError; CapabilityError where the base's
    weight cannot be had.
    """

    name = "hira"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "OpenReview TwJrTz9cRS"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    r: int = 32
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        if self.r > min(site.out, site.inp):
            raise self._fail(f"r={self.r} is over the rank of the {site.out} x {site.inp} matrix of {site.path}", f"Use r={min(site.out, site.inp)}")
        return HiRAPart(site, build, self)


class HiRAPart(MapPart):
    def __init__(self, site: Site, build: Build, m: HiRA) -> None:
        super().__init__(site, build)
        self.A = nn.Parameter(uniform(torch.empty(m.r, site.inp, **like(build, site))))
        self.B = nn.Parameter(torch.zeros(site.out, m.r, **like(build, site)))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        w = self.weight().to(h.dtype)
        return self.map.apply(x, w * (self.cast(self.B, h) @ self.cast(self.A, h)))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w * (self.B @ self.A).to(w.dtype), None

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.B.mul_(c)
        return True
