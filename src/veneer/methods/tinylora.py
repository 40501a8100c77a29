"""TinyLoRA: a handful of numbers, spread over W's leading singular vectors by fixed random matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lora_xs import Between
from .lowrank import Projections, check_rank, lead, with_bank
from .part import Part, like

# the name of the vector that a site shares, where it shares one
SHARES: dict[str, Callable[[Site], str]] = {"none": lambda site: "", "role": lambda site: f"v_{site.role.replace('.', '_')}", "all": lambda site: "v"}


@dataclass(frozen=True)
class TinyLoRA(Method):
    """TinyLoRA ("Learning to reason in 13 parameters", 2026, arXiv 2602.04118).

        y = W x + b + U_r S_r^½ (Σ_i v_i P_i) S_r^½ V_r x,   W = U S V,   P_i (r, r) fixed, v (u) trained

    at        any maps; default 'attn.{q,v}'
    r         2 by default (the paper's)
    u         numbers in v; 64 by default, as in PEFT (the paper goes down to 1)
    share     which maps have the same v: 'none' (default), those of a 'role' in all layers, or 'all'
    dropout   on x before V_r, while training; 0 by default

    v is zero at the start; P ~ N(0, 1/r), the distribution PEFT chose, since the paper leaves it open. Both factors and P are
    saved. Parameters: u a map, a role or altogether. Raises: PlanError; CapabilityError where the base's weight cannot be had.
    """

    name = "tinylora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2602.04118"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 2
    u: int = 64
    share: str = "none"
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, u=self.u)
        self._one_of(SHARES, share=self.share)
        self._share(dropout=self.dropout)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        if self.share == "none":
            yield from super().parts(sites, build)
            return
        # in a bank, since a parameter of several layers could not be sharded
        yield from with_bank(self, sites, build, lambda chosen: Vectors(build, self.u, {SHARES[self.share](s) for s in chosen}))

    def part(self, site: Site, build: Build) -> Part:
        check_rank("TinyLoRA", self.r, site)
        return TinyLoRAPart(site, build, self)


class Vectors(Projections):
    """The vectors that are shared."""

    def __init__(self, build: Build, u: int, names: set[str]) -> None:
        super().__init__(build, trained=tuple(sorted(names)), **{n: (u,) for n in sorted(names)})
        self.u = u

    def unfold(self, saved: dict[str, Any]) -> None:
        """Take those of roles that vn.settle dropped, too."""
        for name in sorted(n for n, t in saved.items() if n.startswith("v_") and n.isidentifier() and not hasattr(self, n) and t.shape == (self.u,)):
            self.trained += (name,)
            self._hold(name, (self.u,))


class TinyLoRAPart(Between):
    P: Tensor

    def __init__(self, site: Site, build: Build, m: TinyLoRA) -> None:
        super().__init__(site, build, m.r, even=True)
        new = like(build, site)
        self.shares = SHARES[m.share](site)
        if not self.shares:
            self.v = nn.Parameter(torch.zeros(m.u, **new))
        self.frozen("P", torch.empty(*lead(site), m.u, m.r, m.r, **new).normal_(std=1 / math.sqrt(m.r)))
        self.dropout = m.dropout

    def core(self) -> Tensor:
        return torch.einsum("u,...uij->...ij", self.shared(self.shares) if self.shares else self.v, self.P)

    def scale_by(self, c: float) -> bool:
        return not self.shares and self._scaled(c, "v")  # a shared vector has other gates as well
