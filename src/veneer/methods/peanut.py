"""PEANuT: dW is what a small network makes of W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .activations import ACTIVATIONS
from .base import Build, Method
from .loha import uniform
from .lowrank import LowRankPart, check_rank, lead
from .part import Part, like


@dataclass(frozen=True)
class PEANuT(Method):
    """Weight-aware neural tweakers (Zhong et al. 2024, arXiv 2410.01870).

        y = (W + s · B f(A W)) x + b,   A (r, out), B (out, r)
        f = act without hidden layers; with `layers` d:   z_0 = act(A W),  z_i = act(E_i z_{i-1}),  u_0 = z_d,
        u_i = act(D_i u_{i-1}) + z_{d-i},  f = u_d,   E_i, D_i (r, r)

    at          any maps; default 'attn.{q,v}'
    r           32 by default, as in Hugging Face PEFT
    layers      hidden layers on each side; 0 by default, as in PEFT
    activation  'relu' by default; gelu, swish/silu, tanh, sigmoid, leakyrelu, identity
    scale       s; 1 by default, as in PEFT

    f(A W) is (r, in), so the deviation is applied by its factors and no (out, in) matrix is made; a step costs one product of
    W with r vectors, for which a packed base is unpacked. B is zero at the start.

    Parameters: 2 r out + 2 layers r² a map. Raises: PlanError for a rank above the matrix's; CapabilityError where the
    base's weight cannot be had.
    """

    name = "peanut"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2410.01870"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 32
    layers: int = 0
    activation: str = "relu"
    scale: float = 1.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._count(layers=self.layers)
        self._one_of(ACTIVATIONS, activation=self.activation)
        self._finite(scale=self.scale)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        check_rank("PEANuT", self.r, site)
        return PEANuTPart(site, build, self)


class PEANuTPart(LowRankPart):
    def __init__(self, site: Site, build: Build, m: PEANuT) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.A = nn.Parameter(uniform(torch.empty(*lead(site), m.r, site.out, **new)))
        self.B = nn.Parameter(torch.zeros(*lead(site), site.out, m.r, **new))
        self.E, self.D = (nn.ParameterList(uniform(torch.empty(*lead(site), m.r, m.r, **new)) for _ in range(m.layers)) for _ in "ED")
        self.act, self.scale = ACTIVATIONS[m.activation], m.scale

    def pair(self) -> tuple[Tensor, Tensor]:
        w = self.weight()
        z = self.act((self.A.to(w.dtype) @ w).to(self.A.dtype))  # in W's dtype: a copy of W would be as large as W
        seen = []
        for e in self.E:
            seen.append(z)
            z = self.act(e @ z)
        for d in self.D:
            z = self.act(d @ z) + seen.pop()
        return z, self.B

    def reads_weight(self) -> bool:
        return True

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "B")
