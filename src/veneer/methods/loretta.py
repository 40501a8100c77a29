"""LoRETTA: LoRA whose factors are tensor trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, check_rank
from .part import Part, like


@dataclass(frozen=True)
class LoRETTA(Method):
    """Low-rank economic tensor-train adaptation (Yang et al., NAACL 2024, arXiv 2402.11417; its LoRETTA_rep).

        y = W x + b + s · B A x,   s = alpha / r;   Aᵀ (in, r) and B (out, r) are tensor trains:
        Aᵀ[i_1 … i_d, j] = G_1[i_1] G_2[i_2] … G_d[i_d] G_{d+1}[j],   in = n_1 · … · n_d,   G_k[i] (t, t), ends 1

    at        linear maps; default 'attn.{q,v}' (the paper's)
    r         8 by default; t 5 by default (both the paper's)
    cores     d, into which a map's size is split as evenly as its prime factors allow; 3 by default
    alpha     2 r by default, as LoRA here
    dropout   on x before A, while training; 0 by default

    B's last core is zero at the start; A's entries have the variance of LoRA's. A and B are multiplied out at each step,
    which costs what LoRA's own parameters take. Parameters: about t² (Σ n_k) for each factor, and 2 t r, in place of
    r (in + out). Raises: PlanError for a rank above the matrix's.
    """

    name = "loretta"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2402.11417"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor")

    r: int = 8
    t: int = 5
    cores: int = 3
    alpha: float | None = None
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, t=self.t, cores=self.cores)
        self._share(dropout=self.dropout)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def part(self, site: Site, build: Build) -> Part:
        check_rank("LoRETTA", self.r, site)
        return LoRETTAPart(site, build, self)


def split(n: int, d: int) -> list[int]:
    """d whole numbers near each other whose product is n: its prime factors, the largest first, each to the least so far."""
    primes, p = [], 2
    while p * p <= n:
        while n % p == 0:
            primes.append(p)
            n //= p
        p += 1
    sizes = [1] * d
    for prime in sorted([*primes, n], reverse=True):
        sizes[sizes.index(min(sizes))] *= prime
    return sorted(sizes)


def contract(cores: nn.ParameterList) -> Tensor:
    """The tensor of a train, flat: its modes in order, the last running fastest."""
    out = cores[0].flatten(0, 1)
    for g in list(cores)[1:]:
        out = (out @ g.flatten(1)).reshape(-1, g.shape[-1])
    return out.reshape(-1)


class LoRETTAPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: LoRETTA) -> None:
        super().__init__(site, build)
        self.r, self.dropout = m.r, m.dropout
        self.scale = 2.0 if m.alpha is None else m.alpha / m.r
        self.A, self.B = (self._train([*split(n, m.cores), m.r], m.t, n, build) for n in (site.inp, site.out))
        with torch.no_grad():
            self.B[-1].zero_()

    def _train(self, sizes: list[int], t: int, fan: int, build: Build) -> nn.ParameterList:
        ranks = [1, *[t] * (len(sizes) - 1), 1]
        # an entry is a sum of t^(d) products of d + 1 numbers: its variance is to be LoRA's 1 / (3 in)
        std = (1 / (3 * fan) / math.prod(ranks)) ** (1 / (2 * len(sizes)))
        new = like(build, self.site)
        shapes = zip(ranks, sizes, ranks[1:], strict=False)
        return nn.ParameterList([nn.Parameter(torch.empty(a, n, b, **new).normal_(std=std)) for a, n, b in shapes])

    def pair(self) -> tuple[Tensor, Tensor]:
        return contract(self.A).reshape(self.site.inp, self.r).t(), contract(self.B).reshape(self.site.out, self.r)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.B[-1].mul_(c)
        return True
