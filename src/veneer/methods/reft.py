"""ReFT: low-rank edits of the residual stream, at chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.positions import Places
from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import OutputPart


@dataclass(frozen=True)
class LoReFT(Method):
    """Low-rank linear subspace ReFT (Wu et al., NeurIPS 2024, arXiv 2404.03592).

        h' = h + Rᵀ (W h + b - R h)      W (r, d), b (r), R (r, d) with orthonormal rows

    for the tokens of `positions`; h is the residual stream that leaves a layer. Within the subspace that R spans, h is
    replaced by W h + b.

    rank       r; 4 by default (the paper: 1 on GLUE to 8 on commonsense reasoning)
    positions  'all' (default), 'first:7+last:7' (the paper's on commonsense reasoning), 'first:n', 'last:n': of the real
               tokens, whichever side is padded. In a decoder's training batch the answer follows the prompt: 'last' means the
               prompt's last tokens only within vn.prompted
    at         'layer' (default: every layer); 'layer@15' for one. Blocks ('ffn', 'attn') too, before their residual add

    R is the orthogonal factor of a trained matrix (QR with a positive diagonal; the authors' code uses torch's Householder
    parametrisation: the same set of R, another path through it). W starts as R and b as 0, so h' = h; the authors' code starts
    W at random. One R and W serve all positions of a layer. Parameters: 2 r d + r a layer. Raises: PlanError.
    """

    name = "loreft"
    family = "additive"
    ports = ("hidden",)
    paper = "arXiv 2404.03592"
    default_at = "layer"
    rate = (9e-4, "LoReFT on commonsense reasoning, 9e-4 (Wu et al. 2024)")

    rank: int = 4
    positions: str = "all"
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(rank=self.rank)
        Places(self.positions)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        if self.rank > site.width:
            raise self._fail(f"rank {self.rank} is over the width {site.width} of {site.path}")
        return LoReFTPart(site, build, self.rank, self.positions)


@dataclass(frozen=True)
class DiReFT(LoReFT):
    """Direct ReFT (Wu et al., NeurIPS 2024, arXiv 2404.03592): LoReFT without the difference, a LoRA on the residual stream.

        h' = h + Rᵀ (W h + b)            W (r, d), b (r), R (r, d)

    orthogonal  R has orthonormal rows (the authors' DireftIntervention); False by default, as in the paper (their
                NodireftIntervention)

    rank, positions and at are LoReFT's. W and b start at 0, R orthonormal, so h' = h. Parameters: 2 r d + r a layer.
    Raises: PlanError.
    """

    name = "direft"

    orthogonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bool(orthogonal=self.orthogonal)

    def part(self, site: Site, build: Build) -> Part:
        super().part(site, build)  # its checks
        return DiReFTPart(site, build, self.rank, self.positions, self.orthogonal)


def orthonormal(a: Tensor) -> Tensor:
    """R (r, d) with orthonormal rows that span those of `a`; `a` itself where its rows are orthonormal already."""
    q, upper = torch.linalg.qr(a.float().t())
    return (q * upper.diagonal().sign()).t().to(a.dtype)


class DiReFTPart(OutputPart):
    reads_state = True

    def __init__(self, site: Site, build: Build, rank: int, positions: str, orthogonal: bool = True) -> None:
        super().__init__(site)
        new = like(build, site)
        start = torch.empty(rank, site.width, **new)
        self.R = nn.Parameter(start if build.blank else nn.init.orthogonal_(start))
        self.W = nn.Parameter(torch.zeros(rank, site.width, **new))
        self.b = nn.Parameter(torch.zeros(rank, **new))
        self.orthogonal = orthogonal
        places = Places(positions)
        self.places = None if places.everywhere else places

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        channels_second = h.shape[-1] != self.site.width  # images as (B, C, *space)
        h = h.movedim(1, -1) if channels_second else h
        r = self.cast(orthonormal(self.R) if self.orthogonal else self.R, h)
        d = nn.functional.linear(self.within(h, r), r.t())
        return d.movedim(-1, 1) if channels_second else d

    def within(self, h: Tensor, r: Tensor) -> Tensor:
        """The edit in the subspace's own coordinates, (…, rank)."""
        return nn.functional.linear(h, self.cast(self.W, h), self.cast(self.b, h))

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.W.mul_(c)
            self.b.mul_(c)
        return True


class LoReFTPart(DiReFTPart):
    def __init__(self, site: Site, build: Build, rank: int, positions: str) -> None:
        super().__init__(site, build, rank, positions)
        with torch.no_grad():
            self.W.copy_(self.R)

    def within(self, h: Tensor, r: Tensor) -> Tensor:
        return nn.functional.linear(h, self.cast(self.W, h) - r, self.cast(self.b, h))

    def scale_by(self, c: float) -> bool:
        """c (W h + b - R h) is no W' h + b' - R h unless c enters W: W' = R + c (W - R)."""
        with torch.no_grad():
            r = orthonormal(self.R)
            self.W.copy_(r + c * (self.W - r))
            self.b.mul_(c)
        return True
