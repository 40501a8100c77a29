"""HRA: the input of a map is reflected several times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .orthogonal import TurnPart
from .part import Part, like


@dataclass(frozen=True)
class HRA(Method):
    """Householder reflection adaptation (Yuan et al., NeurIPS 2024, arXiv 2405.17484).

        y = W H_1 … H_r x + b,   H_i = 1 - 2 u_i u_i^T / |u_i|²,   U = [u_1 … u_r] (in, r)

    A chain of reflections is both orthogonal and of low rank: H_1 … H_r = 1 - U T U^T with an upper triangular T (r, r) whose
    inverse is U^T U above the diagonal and 1/2 on it, so the chain costs two products with U.

    at          linear maps and convolutions (their channels); default 'attn.{q,v}'
    r           reflections, an even number; 8 by default, as in Hugging Face PEFT
    orthogonal  weight of the penalty |1 - U^T U|² of the normed u (the paper's λ; see vn.penalty); 0 by default

    u_1 = u_2, u_3 = u_4, … at the start: the chain is the identity. Parameters: r in for each map. Merges exactly.
    Raises: PlanError for an odd r, and for grouped convolutions.
    """

    name = "hra"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2405.17484"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "tensor")

    r: int = 8
    orthogonal: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._finite(orthogonal=self.orthogonal)
        if self.r % 2:
            raise self._fail(f"r={self.r} is odd, so the reflections cannot cancel at the start", f"Use r={self.r + 1}")
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        return HRAPart(site, build, self)


class HRAPart(TurnPart):
    def __init__(self, site: Site, build: Build, m: HRA) -> None:
        super().__init__(site, build)
        half = uniform(torch.empty(m.r // 2, self.channels, **like(build, site))).t()
        self.U = nn.Parameter(half.repeat_interleave(2, 1))
        self.orthogonal = m.orthogonal

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        u = nn.functional.normalize(self.U, dim=0)
        one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        t = torch.linalg.solve_triangular(torch.triu(u.t() @ u, 1) + one / 2, one, upper=True)
        u, t = self.cast(u, x), self.cast(t if back else t.t(), x)
        return -nn.functional.linear(x @ u @ t, u)

    def penalty(self) -> Tensor | None:
        if not self.orthogonal:
            return None
        u = nn.functional.normalize(self.U, dim=0)
        return self.orthogonal * (torch.eye(u.shape[1], dtype=u.dtype, device=u.device) - u.t() @ u).square().sum()
