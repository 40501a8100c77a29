"""LoRA-XS: a small trained matrix between W's own singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, check_rank, lead
from .matrices import svd, wide
from .part import Part, like


@dataclass(frozen=True)
class LoRAXS(Method):
    """LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604).

        y = W x + b + s · U_r S_r R V_r x,   W = U S V,   s = alpha / r,   R (r, r) trained

    at        any maps; default 'attn.{q,k,v,o},ffn' less what a model has not (the paper adapts all linears)
    r         16 by default (the paper: 4 to 64)
    alpha     16 by default (the paper's)
    dropout   on x before V_r, while training; 0 by default

    R is zero at the start, where the paper's code has N(0, 1e-10); its gradient is not. U_r S_r and V_r are saved, so that a
    quantised base may take the file. Parameters: r² a map, whatever its size. Raises: PlanError for a rank above the
    matrix's; CapabilityError where the base's weight cannot be had.
    """

    name = "lora-xs"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2405.17604"
    mergeable = True
    default_at = "attn.{q,k,v,o},ffn"

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._finite(alpha=self.alpha)
        self._share(dropout=self.dropout)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        check_rank("LoRAXS", self.r, site)
        return LoRAXSPart(site, build, self)


class Between(LowRankPart):
    """Frozen A (r, in) and B (out, r) from W's truncated SVD, and a matrix R (r, r) between them from `core`."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, build: Build, r: int, even: bool, niter: int | None = None, seed: int | None = None) -> None:
        """`even`: S goes half to A and half to B, as its root; else all of it to B. `niter`, `seed`: see starts.svd."""
        super().__init__(site, build)
        new = like(build, site)
        if build.blank:
            a, b = torch.empty(*lead(site), r, site.inp, **new), torch.empty(*lead(site), site.out, r, **new)
        else:
            u, s, v = svd(wide(self.weight()), r, niter, seed)
            b = u * (s.sqrt() if even else s).unsqueeze(-2)
            a = v * s.sqrt().unsqueeze(-1) if even else v
        self.frozen("A", a.to(new["dtype"]).contiguous())
        self.frozen("B", b.to(new["dtype"]).contiguous())

    def core(self) -> Tensor:
        raise NotImplementedError

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.core() @ self.A, self.B


class LoRAXSPart(Between):
    def __init__(self, site: Site, build: Build, m: LoRAXS) -> None:
        super().__init__(site, build, m.r, even=False)
        self.R = nn.Parameter(torch.zeros(*lead(site), m.r, m.r, **like(build, site)))
        self.scale, self.dropout = m.alpha / m.r, m.dropout

    def core(self) -> Tensor:
        return self.R

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "R")
