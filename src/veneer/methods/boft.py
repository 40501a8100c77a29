"""BOFT: the input of a map is rotated by a product of sparse rotations, laid out as butterflies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.maps import Map, take
from ..sites import Site
from ..ties import Ties
from .base import Build, Method
from .orthogonal import TurnPart, blocks, cayley, divides, skew
from .part import Part, like, module_at
from .parts import MapPart


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly orthogonal fine-tuning (Liu et al., ICLR 2024, arXiv 2311.06243).

        y = s ⊙ (W M x) + b,   M = (B_m … B_1)^T,   B_i = P_i diag(R_1, …, R_n) P_i^T

    Each factor is block-diagonal up to a permutation P_i that mixes blocks 2^(i-1) apart; m of them let any number meet any
    other with far fewer parameters than one dense rotation. R_j as in vn.OFT; s (out) scales the outputs.

    at        linear maps and convolutions (their channels); default 'attn.{q,v}'
    block     size of the blocks, a divisor of the inputs, even where factors > 1; 4 by default, as in Hugging Face PEFT
    factors   m; 1 by default, as in PEFT (which drops others without its CUDA extension); the inputs must be a multiple of
              block · 2^(m-1)
    scale     learn s; on by default, as in PEFT

    The identity at the start. Parameters: m in (block - 1) / 2 + out for each map. Merges exactly. Raises: PlanError.
    """

    name = "boft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2311.06243"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv")

    block: int = 4
    factors: int = 1
    scale: bool = True
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(block=self.block, factors=self.factors)
        self._bool(scale=self.scale)
        if self.block < 2 or (self.factors > 1 and self.block % 2):
            raise self._fail(f"block={self.block} with factors={self.factors}", "A block is even where there are several factors, and at least 2")
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        held = Ties(build.model).held
        for site in sites(self.at, "weight", self.default_at):
            build.module = module_at(build.model, site.path)
            alone = len(held.get(id(build.module._parameters.get(site.tensor or "weight")), ())) < 2
            yield site, (part := ButterflyPart(site, build, self, alone))
            if self.scale and part.acts == "input":
                yield site, GainPart(site, build)


class ButterflyPart(TurnPart):
    def __init__(self, site: Site, build: Build, m: BOFT, alone: bool) -> None:
        super().__init__(site, build)
        if m.scale and not alone:
            self.acts = "output"  # type: ignore[misc]
        divides("BOFT", m.block << (m.factors - 1), self)
        self.block, n = m.block, self.channels // m.block
        self.Q = nn.Parameter(torch.zeros(m.factors, n, m.block * (m.block - 1) // 2, **like(build, site)))
        # A slice's rotation acts on its output, so its gain has to be in the same part: they do not commute. So has that of a
        # tied tensor: where another module reads the rows of W, the gain is of rows that are rotated already
        self.s = nn.Parameter(torch.ones(site.out, **like(build, site))) if m.scale and self.acts == "output" else None
        self.orders = [order(self.channels, m.block, i) for i in range(m.factors)]

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        z, steps = x, list(zip(cayley(skew(self.Q, self.block)), self.orders, strict=True))
        for m, at in steps if back else reversed(steps):
            at = at.to(x.device)
            # x P m P^T, where (x P)_at = x and (x P^T) = x_at
            z = z + blocks(z.index_select(-1, torch.argsort(at)), self.cast(m, x), back).index_select(-1, at)
        return z - x

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        d = super().deviation(x, h)
        if self.s is None:
            return d
        s = self.cast(self.s, h)
        return s * d + (s - 1) * plain(h, self)

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        if self.s is None or not m.looked_up:
            return super().across(m, x, h)
        rows = m.looked(x, self.weight().to(h.dtype))
        d = super().fold(rows.flatten(0, -2), None)[0].to(h.dtype).unflatten(0, x.shape)
        s = self.cast(self.s, h)[x].unsqueeze(-1)
        return s * d + (s - 1) * rows

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dw = super().fold(w, b)[0]
        if self.s is None:
            return dw, None
        s = self.s.to(w.dtype)[:, None]
        return s * dw + (s - 1) * w, None


class GainPart(MapPart):
    """dy = (s - 1) ⊙ W x, without the bias."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.s = nn.Parameter(torch.ones(site.out, **like(build, site)))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.features(self.cast(self.s, h) - 1, h) * plain(h, self)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (self.s.to(w.dtype) - 1)[:, None] * w, None

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.s.copy_(1 + c * (self.s - 1))
        return True


def plain(h: Tensor, part: MapPart) -> Tensor:
    """h without the module's bias."""
    bias = part.module._parameters.get("bias")
    return h if bias is None else h - part.map.features(part.cast(take(bias, part.site.slice), h), h)


def order(n: int, block: int, i: int) -> Tensor:
    """The i-th permutation: halves of blocks are dealt out, even ones first, within every block · 2^i numbers."""
    return torch.arange(n).reshape(-1, 1 << i, 2, block // 2 or 1).transpose(1, 2).flatten() if block % 2 == 0 else torch.arange(n)
