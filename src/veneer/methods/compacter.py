"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .activations import ACTIVATIONS
from .base import Build, Method
from .drop import Droppable, draw, ready
from .part import Bank, Part, like
from .parts import OutputPart


@dataclass(frozen=True)
class Compacter(Method):
    """Compacter (Mahabadi et al., NeurIPS 2021, arXiv 2106.04647).

        h' = h + W_up · act(W_down h + b_down) + b_up        W = Σ_i A_i ⊗ (s_i t_iᵀ),  i = 1 … n

    A_i (n, n) are shared by all sites and both matrices; s_i (out/n, r) and t_i (r, in/n) are each matrix's own.

    n          the number of products and the size of A_i; 4 by default (the paper's; also 8, 12)
    size       width of the bottleneck, a multiple of n; or
    reduction  d / width, where `size` is not given, rounded up to a multiple of n; 32 by default (the paper's)
    rank       r; 1 by default (the paper's)
    activation 'gelu' by default (the paper's); as in vn.Bottleneck
    at         'attn,ffn' (default; the paper's Compacter); 'ffn' is its Compacter++
    drop, skip AdapterDrop, as in vn.Bottleneck

    d must be a multiple of n. s of W_up and the biases start at 0, so h' = h (the paper starts near it); A ~ N(0, 1/n), the
    rest Glorot-uniform as in the paper. No matrix W is formed: W x costs r (d + width) n multiplications a token.
    Parameters: n³ in all, and 2 r (d + width) + d + width a site. Raises: PlanError.
    """

    name = "compacter"
    family = "additive"
    ports = ("hidden",)
    paper = "arXiv 2106.04647"
    default_at = "attn,ffn"
    rate = (3e-3, "Compacter, 3e-3 (Mahabadi et al. 2021)")

    n: int = 4
    size: int | None = None
    reduction: float | None = None
    rank: int = 1
    activation: str = "gelu"
    drop: int = 0
    skip: int = 0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(n=self.n, rank=self.rank)
        if self.size is not None and self.reduction is not None:
            raise self._fail("give either size or reduction", "For example vn.Compacter(size=24)")
        if self.size is not None:
            self._positive(size=self.size)
            if self.size % self.n:
                raise self._fail(f"size {self.size} is no multiple of n = {self.n}", f"Give {-(-self.size // self.n) * self.n}")
        if self.reduction is not None:
            self._finite(reduction=self.reduction)
            if self.reduction <= 0:
                raise self._fail(f"reduction must be positive, not {self.reduction!r}")
        self._one_of(ACTIVATIONS, activation=self.activation)
        self._count(drop=self.drop, skip=self.skip)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        bank = Rules(self.n, build)
        yield bank.site, bank
        for site, part in super().parts(sites, build):
            part.__dict__["bank"] = bank
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        if site.width % self.n:
            raise self._fail(f"the width {site.width} of {site.path} is no multiple of n = {self.n}", "Choose n among its divisors")
        size = self.size or max(1, math.ceil(site.width / (self.reduction or 32) / self.n)) * self.n
        if size > 16 * site.width:
            raise self._fail(f"size {size} is over 16 times the width {site.width} of {site.path}")
        return CompacterPart(site, build, self, size)

    @property
    def steady(self) -> bool:
        return self.drop == 0

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        draw([p for p in parts if p.acts], step)


class Rules(Bank):
    """A (n, n, n), shared by every site."""

    def __init__(self, n: int, build: Build) -> None:
        super().__init__("hidden")
        self.A = nn.Parameter(torch.empty(n, n, n, **like(build, self.site)).normal_(std=n**-0.5))


def kronecker(x: Tensor, a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """W x for W = Σ_i A_i ⊗ (s_i t_i): x (…, n·q), A (n, n, n), s (n, p, r), t (n, r, q) -> (…, n·p)."""
    z = torch.einsum("...jq,irq->...jir", x.unflatten(-1, (a.shape[0], -1)), t)
    z = torch.einsum("iaj,...jir->...air", a, z)
    return torch.einsum("...air,ipr->...ap", z, s).flatten(-2)


class CompacterPart(Droppable, OutputPart):
    reads_state = True

    def __init__(self, site: Site, build: Build, m: Compacter, size: int) -> None:
        super().__init__(site)
        new, d, n, r = like(build, site), site.width, m.n, m.rank

        def factor(*shape: int) -> nn.Parameter:
            bound = math.sqrt(6 / (shape[1] + shape[2]))  # Glorot
            return nn.Parameter(torch.empty(*shape, **new).uniform_(-bound, bound))

        self.down_s, self.down_t = factor(n, size // n, r), factor(n, r, d // n)
        self.up_s, self.up_t = nn.Parameter(torch.zeros(n, d // n, r, **new)), factor(n, r, size // n)
        self.down_bias = nn.Parameter(torch.zeros(size, **new))
        self.up_bias = nn.Parameter(torch.zeros(d, **new))
        self.activation = ACTIVATIONS[m.activation]
        ready(self, m.skip, m.drop)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        channels_second = h.shape[-1] != self.site.width  # images as (B, C, *space)
        h = h.movedim(1, -1) if channels_second else h
        a, down_s, down_t, up_s, up_t, b0, b1 = (
            self.cast(p, h) for p in (self.bank.A, self.down_s, self.down_t, self.up_s, self.up_t, self.down_bias, self.up_bias)
        )
        z = self.activation(kronecker(h, a, down_s, down_t) + b0)
        d = kronecker(z, a, up_s, up_t) + b1
        return d.movedim(-1, 1) if channels_second else d

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.up_s.mul_(c)
            self.up_bias.mul_(c)
        return True
