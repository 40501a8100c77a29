"""OFT: the input of a map is rotated, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .orthogonal import TurnPart, blocks, cayley, divides, skew
from .part import Part, like


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning (Qiu et al., NeurIPS 2023, arXiv 2306.07280), rotating inputs as OFTv2 does (arXiv 2506.19847).

        y = W R x + b,   R = diag(R_1, …, R_n)^T,   R_i = (1 + Q_i)(1 - Q_i)⁻¹,   Q_i = -Q_i^T (block x block)

    A rotation keeps the angles between neurons, and so what the base knows of one against another.

    at         linear maps and convolutions (their channels); default 'attn.{q,v}'
    block      size of the blocks, a divisor of the inputs; 32 by default, as in Hugging Face PEFT
    shared     one R_i for all blocks of a map; off by default
    series     None (default): the exact inverse; a number: that many terms of its series (PEFT's way, with 5), which
               costs no solver but is only nearly orthogonal
    constrain  keep each |Q_i| within this / sqrt(blocks) (COFT; the paper's and PEFT's value is 6e-5); None by default

    Q is zero at the start. Parameters: in (block - 1) / 2 for each map. Merges exactly.
    Raises: PlanError for a block that does not divide the inputs, and for grouped convolutions.
    """

    name = "oft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2306.07280"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "tensor")

    block: int = 32
    shared: bool = False
    series: int | None = None
    constrain: float | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(block=self.block)
        self._bool(shared=self.shared)
        if self.block < 2:
            raise self._fail("a block of 1 has nothing to rotate", "Use block=2 or more")
        if self.series is not None:
            self._positive(series=self.series)
            if self.series < 3:
                raise self._fail(f"{self.series} terms are not enough for a rotation", "Use series=5, or None for the exact one")
        if self.constrain is not None:
            self._finite(constrain=self.constrain)
            if self.constrain <= 0:
                raise self._fail(f"constrain={self.constrain} leaves nothing to learn", "Give a positive bound, or None")
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        return OFTPart(site, build, self)


class OFTPart(TurnPart):
    def __init__(self, site: Site, build: Build, m: OFT) -> None:
        super().__init__(site, build)
        divides("OFT", m.block, self)
        self.block, self.series, self.constrain = m.block, m.series, m.constrain
        self.count = self.channels // m.block
        self.Q = nn.Parameter(torch.zeros(1 if m.shared else self.count, m.block * (m.block - 1) // 2, **like(build, site)))

    def matrices(self) -> Tensor:
        """R_i - 1, (blocks, block, block)."""
        q = skew(self.Q, self.block)
        if self.constrain is not None:
            most = self.constrain / self.Q.shape[0] ** 0.5
            q = q * (most / torch.linalg.matrix_norm(q, keepdim=True).clamp(min=most))
        return cayley(q, self.series).expand(self.count, -1, -1)

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        return blocks(x, self.cast(self.matrices(), x), back)
