"""LoRA: h' = W x + s · B A x."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ..plan import finite, short
from ..sites import Site
from .base import Build, Method
from .factors import LoRAPart
from .part import Part, module_at
from .starts import STARTS, Start


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
    init      what A and B start with; the output is the base's in each case:
              'kaiming'    A ~ U(-1/sqrt(in), 1/sqrt(in)), as the paper's code; B = 0
              'gaussian'   A ~ N(0, 1/r²); B = 0
              'orthogonal' A and B Gaussians over orthogonal rows, so that B A = 0 (r even)
              'pissa'      W's r leading singular triplets (Meng et al. 2024, arXiv 2404.02948)
              'olora'      the QR factors of W (Büyükakyüz 2024, arXiv 2406.01775)
              'mica'       B = W's minor left singular vectors, frozen; A = 0 (arXiv 2604.01694)
              'eva'        A = leading right singular vectors of the map's inputs, of uncentred data; B = 0. Ranks are dealt
                           out anew by explained variance (Paischer et al. 2024, arXiv 2410.07170). Needs data.
              'corda'      singular triplets of W C, times C⁻¹, C = mean x xᵀ: the r largest, in which the data acts most
                           (instruction-previewed), or with 'corda-kpm' the r smallest, which leave what the data shows
                           alone (knowledge-preserved; Yang et al. 2024, arXiv 2406.05223). Need data.
              'lora-ga'    singular vectors of the loss's gradient (Wang et al. 2024, arXiv 2407.05000). Needs data.
    rank_stabilized  s = alpha / sqrt(r), alpha 16 by default (Kalajdzievski 2023, arXiv 2312.03732)
    b_rate    B's learning rate as a multiple of the run's; 1. LoRA+ uses 16 (Hayou et al. 2024, arXiv 2402.12354)
    freeze_a  A stays as it starts, and half of the optimiser's state with it: LoRA-FA (Zhang et al. 2023, arXiv 2308.03303)
    ranks     patterns of sites -> r, where it is not the same everywhere: {'ffn.*': 4}; the first that matches counts
    alphas    the same for alpha
    tied      at a table that other modules hold too (a tied head), act there too; False: at the named site alone, as
              Hugging Face PEFT does, and then it cannot be merged
    rho       'eva': no map's rank grows over rho · r; 2 as in the paper. 1: no dealing out
    niter     'pissa', 'lora-ga', 'corda': iterations of a randomised SVD; None (default) is the exact one, 16 PiSSA's fast one

    Parameters: r (in + out) for each map; a shifted start ('pissa', 'olora', 'corda', 'lora-ga') saves its frozen copy as well.
    Raises: PlanError for a rank below 1 or above the matrix's, or a start without the data it needs.
    """

    name = "lora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2106.09685"
    mergeable = True
    holds = "factors"
    default_at = "attn.{q,v}"
    rate = (5e-4, "UniPELT's for LoRA, 5e-4 (Mao et al. 2022, A.1); Hu et al. 2021, D take 2e-4 to 5e-4")
    starts: ClassVar[dict[str, Start]] = STARTS

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    at: str | None = None
    rank_stabilized: bool = False
    b_rate: float = 1.0
    freeze_a: bool = False
    ranks: dict[str, int] | None = field(default=None, hash=False)
    alphas: dict[str, float] | None = field(default=None, hash=False)
    rho: float = 2.0
    niter: int | None = None
    tied: bool = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._share(dropout=self.dropout)
        self._one_of(self.starts, init=self.init)
        self._pattern()
        self._bool(rank_stabilized=self.rank_stabilized, freeze_a=self.freeze_a, tied=self.tied)
        self._finite(b_rate=self.b_rate, rho=self.rho, **({} if self.alpha is None else {"alpha": self.alpha}))
        if self.b_rate <= 0 or self.rho < 1:
            raise self._fail(f"b_rate must be positive and rho at least 1, not {self.b_rate!r} and {self.rho!r}")
        if self.niter is not None:
            self._positive(niter=self.niter)
        for key, good in (("ranks", lambda v: isinstance(v, int) and finite(v) and v > 0), ("alphas", finite)):
            table = getattr(self, key)
            if table is None:
                continue
            if not isinstance(table, dict) or not table or not all(isinstance(k, str) and good(v) for k, v in table.items()):
                raise self._fail(f"{key} is {short(table)}", f"Give patterns and numbers: {key}={{'ffn.*': 4}}")
            object.__setattr__(self, key, dict(table))  # a copy: plans do not change
        if self.freeze_a and "B" in self.starts[self.init].frozen:
            raise self._fail(f"init={self.init!r} freezes B and freeze_a A: nothing is left to train")
        object.__setattr__(self, "needs_data", self.starts[self.init].data)

    def ungated(self) -> Method:
        return replace(self, alpha=self.r, alphas=self.ranks, rank_stabilized=False)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        ranks, alphas = ({s: v for at, v in reversed((table or {}).items()) for s in sites(at, "weight", "")} for table in (self.ranks, self.alphas))
        made = []
        for site in sites(self.at, "weight", self.default_at):
            build.module = module_at(build.model, site.path)
            one = replace(self, r=ranks.get(site, self.r), alpha=alphas.get(site, self.alpha), ranks=None, alphas=None)
            made.append((site, one.part(site, build)))
        if not build.blank:
            with torch.no_grad():
                self.starts[self.init].fill([p for _, p in made if isinstance(p, LoRAPart)], self, build)
        yield from made

    def part(self, site: Site, build: Build) -> Part:
        return LoRAPart(site, build, self)

    def scale(self, build: Build) -> float:
        """s for a site of this rank."""
        if build.gated:
            return 1.0
        alpha = self.alpha if self.alpha is not None else 16 if self.rank_stabilized else 2 * self.r
        return alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)
