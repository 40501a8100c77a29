"""MoSLoRA: LoRA with a trained mixer between its factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, check_rank, kaiming, lead
from .part import Part, like


@dataclass(frozen=True)
class MoSLoRA(Method):
    """Mixture of subspaces in LoRA (Wu et al., EMNLP 2024, arXiv 2406.11909).

        y = W x + b + s · B M A x,   s = alpha / r,   A (r, in), M (r, r), B (out, r), all trained

    LoRA is M = I: each of its r pieces meets one of A's rows alone; the mixer lets all meet all.

    at        any maps; default 'attn.{q,v}'
    r         8 by default; alpha 2 r by default, as LoRA here
    mixer     'orthogonal' (default) or 'kaiming', the paper's two best starts
    dropout   on x before A, while training; 0 by default

    B is zero at the start. Parameters: r (in + out + r) a map. Raises: PlanError for a rank above the matrix's.
    """

    name = "moslora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2406.11909"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 8
    alpha: float | None = None
    mixer: str = "orthogonal"
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._one_of(("orthogonal", "kaiming"), mixer=self.mixer)
        self._share(dropout=self.dropout)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)

    def part(self, site: Site, build: Build) -> Part:
        check_rank("MoSLoRA", self.r, site)
        return MoSLoRAPart(site, build, self)


class MoSLoRAPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: MoSLoRA) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.A = nn.Parameter(kaiming(torch.empty(*lead(site), m.r, site.inp, **new), site.inp))
        self.B = nn.Parameter(torch.zeros(*lead(site), site.out, m.r, **new))
        mixer = torch.empty(*lead(site), m.r, m.r, **new)
        if m.mixer == "kaiming":
            kaiming(mixer, m.r)
        elif not build.blank:
            mixer = torch.linalg.qr(mixer.normal_()).Q.contiguous()
        self.M = nn.Parameter(mixer)
        self.scale, self.dropout = 2.0 if m.alpha is None else m.alpha / m.r, m.dropout

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.M @ self.A, self.B

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "B")
