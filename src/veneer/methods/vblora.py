"""VB-LoRA: every piece of every factor is a mixture of a few vectors from one bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, Projections, check_rank, with_bank
from .part import Part, like


@dataclass(frozen=True)
class VBLoRA(Method):
    """Vector-bank LoRA (Li et al., NeurIPS 2024, arXiv 2405.15179).

        y = W x + b + B A x;   each run of `length` numbers in a row of A or a column of B is Σ_j softmax(top-k of σ)_j · v_j

    with the bank v (vectors, length) shared by all maps, and logits σ (vectors) for each run.

    at        linear maps whose sizes `length` divides; default 'attn.{q,v}'
    r         4 by default, as in the paper and PEFT
    vectors   of the bank, 256 by default; `length` of each, 256 by default (both PEFT's; the paper: 30 to 2048 and 256)
    k         vectors in a mixture; 2 by default (the paper's)
    bound     v ~ U(-bound, bound); 0.02 by default; σ ~ N(0, std²), std 0.1 by default (the paper's)
    bank_rate the bank's learning rate as a multiple of the run's; 0.1 by default (the paper's: 0.001 and 0.01)
    dropout   on x before A, while training; 0 by default

    Neither factor is zero at the start, so the output is not quite the base's (the paper's choice; ΔW ~ r · bound² / 3).
    A gate's constant cannot be folded into a bank that other maps share, so it is kept as a gate.

    Parameters: vectors · length once, and r (in + out) / length · vectors a map (of which k indices and weights matter in
    the end). Raises: PlanError where `length` does not divide a map's size.
    """

    name = "vblora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2405.15179"
    mergeable = True
    identity_at_init = False
    default_at = "attn.{q,v}"
    rate = (1e-2, "VB-LoRA's for its logits, 0.01; its bank gets a tenth (Li et al. 2024)")
    kinds = ("linear", "transposed", "tensor")

    r: int = 4
    vectors: int = 256
    length: int = 256
    k: int = 2
    bound: float = 0.02
    std: float = 0.1
    bank_rate: float = 0.1
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, vectors=self.vectors, length=self.length, k=self.k)
        self._finite(bound=self.bound, std=self.std, bank_rate=self.bank_rate)
        self._share(dropout=self.dropout)
        self._pattern()
        if self.k > self.vectors:
            raise self._fail(f"k={self.k} is over the {self.vectors} vectors of the bank", f"Use k={self.vectors} or less")
        if min(self.bound, self.bank_rate) <= 0 or self.std < 0:
            raise self._fail(f"bound and bank_rate must be positive and std at least 0, not {self.bound!r}, {self.bank_rate!r} and {self.std!r}")

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        def bank(chosen: list[Site]) -> Projections:
            made = Projections(build, trained=("v",), v=(self.vectors, self.length))
            made.rates = {"v": self.bank_rate}  # type: ignore[misc]
            with torch.no_grad():
                made.v.uniform_(-self.bound, self.bound)
            return made

        yield from with_bank(self, sites, build, bank)

    def part(self, site: Site, build: Build) -> Part:
        check_rank("VBLoRA", self.r, site)
        for size in (site.inp, site.out):
            if size % self.length:
                best = max(n for n in range(1, self.length + 1) if site.inp % n == 0 and site.out % n == 0)
                raise PlanError(
                    f"VBLoRA: length={self.length} does not divide the {site.out} x {site.inp} matrix",
                    where=site.path,
                    fix=f"Use length={best}",
                )
        return VBLoRAPart(site, build, self)


class VBLoRAPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: VBLoRA) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.logits_A = nn.Parameter(torch.empty(m.r, site.inp // m.length, m.vectors, **new).normal_(std=m.std))
        self.logits_B = nn.Parameter(torch.empty(site.out // m.length, m.r, m.vectors, **new).normal_(std=m.std))
        self.k, self.dropout = m.k, m.dropout

    def mixed(self, logits: Tensor) -> Tensor:
        """(…, vectors) -> (…, length)."""
        top, which = logits.topk(self.k, -1)
        return (top.softmax(-1).unsqueeze(-1) * self.shared("v")[which]).sum(-2)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.mixed(self.logits_A).flatten(1), self.mixed(self.logits_B).transpose(1, 2).flatten(0, 1)
