"""C3A: dW is made of circulant blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class C3A(Method):
    """Circular convolution adaptation (Chen et al., ACL 2025, arXiv 2407.19342).

        y_m = (W x + b)_m + (1 / in) · Σ_n C(w_mn) x_n,   C(w)_ij = w_(j - i mod block)

    x and y are cut into pieces of `block` numbers; every block of dW is circulant, given by its first row, and applied by
    FFTs.

    at        linear maps; default 'attn.{q,v}'
    block     size of the blocks, a divisor of in and out; 256 by default, as in Hugging Face PEFT

    w is zero at the start (PEFT draws it at random). Parameters: in · out / block for each map.
    Raises: PlanError for a block that does not divide in and out, with those that do.
    """

    name = "c3a"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2407.19342"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor")

    block: int = 256
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(block=self.block)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        common = math.gcd(site.out, site.inp)
        if common % self.block:
            able = [d for d in range(1, common + 1) if common % d == 0]
            raise self._fail(f"block={self.block} does not divide the {site.out} x {site.inp} matrix of {site.path}", f"Blocks that do: {able}")
        return C3APart(site, build, self)


class C3APart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: C3A) -> None:
        super().__init__(site, build)
        self.block, self.inp = m.block, site.inp
        self.w = nn.Parameter(torch.zeros(site.out // m.block, site.inp // m.block, m.block, **like(build, site)))

    def delta(self) -> Tensor:
        i = torch.arange(self.block, device=self.w.device)
        blocks = self.w[:, :, (i[None, :] - i[:, None]) % self.block]  # (M, N, block, block)
        return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1) / self.inp

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        # A circulant product is a circular correlation: a product of spectra
        with torch.autocast(x.device.type, enabled=False):  # there is no FFT in bf16
            fx = torch.fft.rfft(x.float().unflatten(-1, (-1, self.block)))
            y = torch.einsum("...nb,mnb->...mb", fx, torch.fft.rfft(self.w.float()).conj())
            return (torch.fft.irfft(y, n=self.block).flatten(-2, -1) / self.inp).to(h.dtype)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.w.mul_(c)
        return True
