"""FRoD: a basis that all layers share, and in it a trained diagonal and a few trained entries off it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..ops.sparse import dense, sparse_product
from ..sites import Site
from .base import Build, Method
from .bases import Bases, kind, left
from .lowrank import with_bank
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class FRoD(Method):
    """Full-rank fine-tuning with rotational degrees (AAAI 2026, doi 10.1609/aaai.v40i31.39813).

        y = W x + b + U (S + diag(d)) Vᵀ x,   W = U diag(λ) Vᵀ,   U (out, in) with columns of length 1, V (in, in)

    V is shared by the maps of one kind in all layers: with their matrices on top of each other, W_* = Q R, and E the
    eigenvectors of mean_i (Q_iᵀ Q_i + ridge)⁻¹, it is Rᵀ E (a higher-order generalised SVD); where they have fewer rows than
    columns, all right singular vectors of W_*. S is zero but at random places off the diagonal, the same for a kind.

    at     linear maps; default 'attn.{q,v}'
    share  of S's entries that are trained; 0.01 by default, as in Hugging Face PEFT
    seed   of their places; 0 by default
    ridge  1e-3 by default, as in PEFT

    S and d are zero at the start. U, V and S's places are frozen. U is made of W and V when attached and loaded, and not saved;
    it takes as much memory as W, and V (saved) an (in, in) a kind: thin are the trained numbers alone. The decompositions take
    a while in wide models. Parameters: in + share · in² a map. Raises: PlanError; CapabilityError where the base's weight
    cannot be had.
    """

    name = "frod"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "doi 10.1609/aaai.v40i31.39813"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "tensor")

    share: float = 0.01
    seed: int = 0
    ridge: float = 1e-3
    at: str | None = None

    def __post_init__(self) -> None:
        self._share(share=self.share)
        self._count(seed=self.seed)
        self._finite(ridge=self.ridge)
        self._pattern()
        if self.ridge <= 0:
            raise self._fail(f"ridge={self.ridge} is not positive", "Use ridge=1e-3")

    def entries(self, n: int) -> int:
        """How many of S (n, n) are trained."""
        return max(1, min(int(n * n * self.share), n * n - n)) if self.share and n > 1 else 0

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        for site, part in with_bank(self, sites, build, lambda chosen: Bases(self, chosen, build)):
            if not build.blank:
                part.derive()
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        if site.inp**2 >= 1 << 31:
            raise PlanError(f"FRoD: {site.inp}² places are more than int32 can number", where=site.path, fix="Leave that map out: at='…,!name:…'")
        return FRoDPart(site, build, self)


class FRoDPart(MapPart):
    U: Tensor

    def __init__(self, site: Site, build: Build, m: FRoD) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.kind = kind(site)
        self.d = nn.Parameter(torch.zeros(site.inp, **new))
        self.S = nn.Parameter(torch.zeros(m.entries(site.inp), **new))
        self.register_buffer("U", torch.empty(site.out, site.inp, **new), persistent=False)

    def shared(self, name: str) -> Tensor:
        return getattr(self.bank, f"{name}_{self.kind}").to(self.d.device)

    def derive(self) -> None:
        w = self.weight()
        self.register_buffer("U", left(w, self.shared("V"))[0].to(self.d.device, w.dtype), persistent=False)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        z = nn.functional.linear(x.to(h.dtype), self.cast(self.shared("V").t(), h))
        mixed = z * self.cast(self.d, z)
        if len(self.S):
            mixed = mixed + sparse_product(z, self.cast(self.S, z), self.shared("index"), self.site.inp)
        return nn.functional.linear(mixed, self.cast(self.U, mixed))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        core = dense(self.S.to(w.dtype), self.shared("index"), self.site.inp, self.site.inp) + torch.diag(self.d.to(w.dtype))
        return self.U.to(w.dtype) @ core @ self.shared("V").to(w.dtype).t(), None

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.d.mul_(c)
            self.S.mul_(c)
        return True
