"""LoRA: h' = W x + (alpha / r) · B A x."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .parts import MapPart, Part, like


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685).

        y = W x + b + s · B A x,   s = alpha / r,   A (r, in), B (out, r)

    at        any maps: linears, convolutions (A has the kernel, B is 1x1), embeddings, slices of fused projections,
              expert tensors. Default 'attn.{q,v}' (the paper's).
    r         rank, 8 by default (the paper tries 1 to 64)
    alpha     numerator of the scale; 2 r by default, so s = 2 (UniPELT's 16 for r = 8). Under a gate s = 1: the gate
              takes its place (Mao et al. 2022)
    dropout   on x before A, while training; 0 by default
    init      'kaiming': A ~ U(-1/sqrt(in), 1/sqrt(in)), as the paper's code; 'gaussian': A ~ N(0, 1/r²). B is zero,
              so the start is the base exactly.

    Parameters: r (in + out) for each map. Raises: PlanError for a rank below 1 or above the matrix's.
    """

    name = "lora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2106.09685"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._share(dropout=self.dropout)
        self._one_of(("kaiming", "gaussian"), init=self.init)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def ungated(self) -> Method:
        return replace(self, alpha=self.r)

    def part(self, site: Site, build: Build) -> Part:
        full = min(site.out, site.inp)
        if self.r > full:
            raise PlanError(
                f"LoRA: rank {self.r} is over the rank {full} of the {site.out} x {site.inp} matrix",
                where=site.path,
                fix=f"Use r={full} or less",
            )
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return LoRAPart(site, build, self, 1.0 if build.gated else alpha / self.r)


class LoRAPart(MapPart):
    def __init__(self, site: Site, build: Build, m: LoRA, scale: float) -> None:
        super().__init__(site, build)
        lead = (site.experts,) if site.experts else ()
        self.A = nn.Parameter(torch.empty(*lead, m.r, site.inp, **like(build, site)))
        self.B = nn.Parameter(torch.zeros(*lead, site.out, m.r, **like(build, site)))
        if m.init == "gaussian":
            nn.init.normal_(self.A, std=1 / m.r)
        else:
            nn.init.uniform_(self.A, -1 / math.sqrt(site.inp), 1 / math.sqrt(site.inp))
        self.scale, self.dropout = scale, m.dropout

    def entry(self, x: Tensor) -> Tensor:
        """What A is applied to."""
        if self.dropout and self.training and x.is_floating_point():
            return nn.functional.dropout(x, self.dropout)
        return x

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the deviation s · B A entry(x), in x's dtype."""
        return self.cast(self.A, x), self.cast(self.B, x), self.scale

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        x = self.entry(x)
        z = self.map.down(x, self.cast(self.A, h))
        return self.map.up(z * self.scale if self.scale != 1 else z, self.cast(self.B, h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * (self.B.to(w.dtype) @ self.A.to(w.dtype)), None

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.B.mul_(c)
        return True
