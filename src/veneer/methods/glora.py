"""GLoRA: W and b are scaled, shifted, and joined, each by a matrix, a vector or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class GLoRA(Method):
    """Generalised LoRA (Chavan et al. 2023, arXiv 2306.07967).

        y = (W + W ⊙ A + B) x + b + b ⊙ D + E + W C

    A, B (out, in) and C (in, 1) are each 'lora', a product with r between; 'vector' (A and B: one number for each
    output); 'constant', one number (not C); or 'none'. D, E (out): 'vector', 'constant' or 'none'.

    at   linear maps, convolutions and embeddings; default 'attn.{q,v}'
    r    8 by default, as in Hugging Face PEFT
    ab   what A and B are; 'lora' by default, as in PEFT
    c    what C is; 'lora' by default, as in PEFT
    de   what D and E are; 'constant' by default, as in PEFT. The paper finds all three by evolution, map by map: sums of
         GLoRAs at several places say the same, and vn.select searches

    C, D and E change a bias, so maps without one have none. All are zero at the start (of a 'lora' its left factor). Only
    ab='lora' needs an (out, in) matrix in a step, for W ⊙ A, which has no cheaper form; a vector's A scales the output.

    Parameters: 2 r (in + out) + r (in + 1) + 2 a map with the defaults. Raises: PlanError where nothing is left to train;
    CapabilityError where the base's weight cannot be had.
    """

    name = "glora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2306.07967"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    r: int = 8
    ab: str = "lora"
    c: str = "lora"
    de: str = "constant"
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._one_of(("lora", "vector", "constant", "none"), ab=self.ab)
        self._one_of(("lora", "vector", "none"), c=self.c)
        self._one_of(("vector", "constant", "none"), de=self.de)
        self._pattern()
        if {self.ab, self.c, self.de} == {"none"}:
            raise self._fail("ab, c and de are all 'none': nothing is left to train", "Say ab='vector', or 'lora'")

    def part(self, site: Site, build: Build) -> Part:
        return GLoRAPart(site, build, self)


class GLoRAPart(MapPart):
    """Of each path its tensor X, or the factors X_d (·, r) and X_u (r, ·) of a 'lora'."""

    def __init__(self, site: Site, build: Build, m: GLoRA) -> None:
        super().__init__(site, build)
        biased = self.bias() is not None and not self.map.read_by_others
        if m.ab == "none" and not biased:
            raise PlanError("GLoRA: c and de change a bias, and this map has none", where=site.path, fix="Say ab='vector', or leave it out of `at`")
        self.dense = m.ab == "lora"
        new = like(build, site)
        self._path("A", m.ab, site.out, site.inp, m.r, new)
        self._path("B", m.ab, site.out, site.inp, m.r, new)
        if biased:
            self._path("C", m.c, site.inp, 1, m.r, new)
            self._path("D", m.de, site.out, 1, m.r, new)
            self._path("E", m.de, site.out, 1, m.r, new)

    def _path(self, name: str, kind: str, rows: int, columns: int, r: int, new: dict[str, Any]) -> None:
        if kind == "lora":
            self.register_parameter(f"{name}_d", nn.Parameter(torch.zeros(rows, r, **new)))
            self.register_parameter(f"{name}_u", nn.Parameter(uniform(torch.empty(r, columns, **new))))
        elif kind != "none":
            self.register_parameter(name, nn.Parameter(torch.zeros(rows if kind == "vector" else 1, **new)))

    def path(self, name: str) -> Tensor | None:
        """A 'lora' whole; a vector or constant as a column."""
        own = self._parameters
        if f"{name}_d" in own:
            return own[f"{name}_d"] @ own[f"{name}_u"]  # type: ignore[operator]
        return own[name].unsqueeze(1) if name in own else None  # type: ignore[union-attr]

    def shift(self, w: Tensor | None = None) -> Tensor | None:
        """b ⊙ D + E + W C, (out)."""
        c, d, e = (self.path(n) for n in "CDE")
        terms: list[Tensor] = []
        if c is not None:
            w = self.weight() if w is None else w
            terms.append((w @ c.to(w.dtype)).to(c.dtype).squeeze(1))
        if d is not None and e is not None:
            terms.append(d.squeeze(1) * self.bias().to(d.dtype) + e.squeeze(1))  # type: ignore[union-attr]
        return sum(terms[1:], terms[0]) if terms else None

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b, shift = self.path("A"), self.path("B"), self.shift()
        out: Any = 0
        if self.dense:
            out = self.map.apply(x, self.weight().to(h.dtype) * self.cast(a, h) + self.cast(b, h))  # type: ignore[arg-type]
        elif a is not None and b is not None:
            ones = torch.ones(1, self.site.inp, dtype=h.dtype, device=h.device)
            rows = self.map.features(self.cast(a.expand(self.site.out, 1).squeeze(1), h), h)
            out = rows * self.bare(h) + self.map.up(self.map.down(x, ones), self.cast(b.expand(self.site.out, 1), h))
        if shift is not None:
            out = out + self.map.features(self.cast(shift, h), h)
        return out.expand_as(h)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale, add = self.path("A"), self.path("B")
        dw = torch.zeros_like(w) if scale is None or add is None else w * scale.to(w.dtype) + add.to(w.dtype)
        own = self.bias()
        if b is None or own is None:
            return dw, None
        shift = self.shift(w)
        db = torch.zeros_like(b) if shift is None else shift.to(b.dtype).expand_as(b)
        if scale is not None and not self.dense:  # a bias that another method moved is scaled with the output
            db = db + scale.squeeze(1).to(b.dtype) * (b - own.to(b.dtype))
        return dw, db

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            for name, p in self._parameters.items():
                if p is not None and not name.endswith("_u"):
                    p.mul_(c)
        return True
