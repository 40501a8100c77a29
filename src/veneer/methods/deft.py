"""DEFT: what W writes into a few directions is taken out, and something else put in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class DEFT(Method):
    """Decompositional efficient fine-tuning (Kumar et al., NeurIPS 2025, arXiv 2509.22793).

        y = (W - Q Tᵀ W + s Q R) x + b,   P (out, r), R (r, in)
        projection 'relu':  Q = P, T = relu(P)        'qr':  Q = T = the orthogonal factor of P

    at          linear maps, convolutions and embeddings; default 'attn.{q,v}'
    r           8 by default, as in Hugging Face PEFT
    projection  'relu' by default, as in PEFT; 'qr' takes the directions out wholly
    alpha       s = alpha / r; None (default): s = 1, as in PEFT
    inject      False: nothing is put in. That is PaRa (Chen et al., ICLR 2025), W of a rank lower by r; on by default

    P ~ N(0, 0.02²) and R = Tᵀ W / s at the start, so that the output is the base's; with inject=False it is not. Tᵀ W x is had
    from the base's own output, so no product with W is made while training, and a packed base is unpacked once.

    Parameters: r (in + out) a map; r out with inject=False. Raises: PlanError for r over the outputs, and for
    grouped convolutions; CapabilityError where the base's weight cannot be had.
    """

    name = "deft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2509.22793"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    r: int = 8
    projection: str = "relu"
    alpha: float | None = None
    inject: bool = True
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._one_of(("relu", "qr"), projection=self.projection)
        self._bool(inject=self.inject)
        self._pattern()
        if self.alpha is not None:
            self._finite(alpha=self.alpha)
            if not self.alpha:
                raise self._fail("alpha=0 puts nothing in", "Leave it out for s = 1, or say inject=False")
        object.__setattr__(self, "identity_at_init", self.inject)

    def part(self, site: Site, build: Build) -> Part:
        if self.r > site.out:
            raise PlanError(f"DEFT: r={self.r} is over the {site.out} outputs", where=site.path, fix=f"Use r={site.out} or less")
        return DEFTPart(site, build, self)


class DEFTPart(MapPart):
    R: Tensor | None

    def __init__(self, site: Site, build: Build, m: DEFT) -> None:
        super().__init__(site, build)
        if getattr(self.map, "groups", 1) > 1:
            raise PlanError("DEFT: the outputs of a grouped convolution have several inputs", where=site.path, fix="Leave it out: at='…,!name:…'")
        new = like(build, site)
        self.qr, self.scale = m.projection == "qr", 1.0 if m.alpha is None else m.alpha / m.r
        self.P = nn.Parameter(torch.empty(site.out, m.r, **new).normal_(std=0.02))
        r = torch.empty(m.r, site.inp, **new)
        if m.inject and not build.blank:
            with torch.no_grad():
                r = self.directions()[1].t() @ self.weight().to(r) / self.scale
        self.register_parameter("R", nn.Parameter(r) if m.inject else None)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Q and T, both (out, r)."""
        if not self.qr:
            return self.P, torch.relu(self.P)
        q = torch.linalg.qr(self.P)[0]
        return q, q

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        q, t = (self.cast(p, h) for p in self.directions())
        z = -self.map.up(self.bare(h), t.t())
        if self.R is not None:
            z = z + self.map.down(x, self.cast(self.scale * self.R, h))
        return self.map.up(z, q)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, t = (p.to(w.dtype) for p in self.directions())
        z = -(t.t() @ w)
        if self.R is not None:
            z = z + self.scale * self.R.to(w.dtype)
        own = self.bias()  # of a bias that another method moved, the move is projected too
        return q @ z, None if b is None or own is None else -(q @ (t.t() @ (b - own.to(b.dtype))))

    def scale_by(self, c: float) -> bool:
        if self.qr or self.R is None and c < 0:
            return c == 1.0
        with torch.no_grad():  # both terms are quadratic, and relu lets a positive factor through
            for p in (self.P, self.R):
                if p is not None:
                    p.mul_(abs(c) ** 0.5)
        return c >= 0
