"""GraLoRA: a LoRA for every block of the matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class GraLoRA(Method):
    """Granular low-rank adaptation (Jung et al., NeurIPS 2025, arXiv 2505.20355).

        y_j = (W x + b)_j + s · Σ_n B_jn A_jn x_n,   A_jn (r/k, in/k), B_jn (out/k, r/k),   s = alpha / r

    The matrix is cut into k x k blocks, each with a LoRA of rank r / k: as many parameters as one of rank r, and a rank of up
    to k r; an outlier in one input reaches the gradients of its own blocks only.

    at      linear maps; default 'attn.{q,v}'
    r       32 by default, as in Hugging Face PEFT; a multiple of k
    k       2 by default, as in PEFT; divides in and out
    alpha   2 r by default, as for vn.LoRA

    B is zero at the start. Parameters: r (in + out) for each map. Raises: PlanError.
    """

    name = "gralora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2505.20355"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor")

    r: int = 32
    k: int = 2
    alpha: float | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, k=self.k)
        if self.alpha is not None:
            self._finite(alpha=self.alpha)
        if self.r % self.k:
            raise self._fail(f"r={self.r} is not a multiple of k={self.k}", f"Use r={self.k * max(1, round(self.r / self.k))}")
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        common = math.gcd(site.out, site.inp)
        if common % self.k:
            able = [d for d in range(1, min(common, 64) + 1) if common % d == 0]
            raise self._fail(f"k={self.k} does not divide the {site.out} x {site.inp} matrix of {site.path}", f"Numbers that do: {able}")
        return GraLoRAPart(site, build, self)


class GraLoRAPart(DeltaPart):
    """A (n, j, s, in/k), B (j, n, s, out/k): block n of the inputs, j of the outputs, s of the rank."""

    def __init__(self, site: Site, build: Build, m: GraLoRA) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.A = nn.Parameter(uniform(torch.empty(m.k, m.k, m.r // m.k, site.inp // m.k, **new)))
        self.B = nn.Parameter(torch.zeros(m.k, m.k, m.r // m.k, site.out // m.k, **new))
        self.k, self.scale = m.k, (2 * m.r if m.alpha is None else m.alpha) / m.r

    def delta(self) -> Tensor:
        return self.scale * torch.einsum("njsi,jnso->joni", self.A, self.B).flatten(2, 3).flatten(0, 1)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        z = torch.einsum("...ni,njsi->...jns", x.unflatten(-1, (self.k, -1)), self.cast(self.A, h))
        return torch.einsum("...jns,jnso->...jo", z * self.scale, self.cast(self.B, h)).flatten(-2)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.B.mul_(c)
        return True
