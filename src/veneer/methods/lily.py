"""Lily: neighbouring layers share A, all layers share several B, and a router mixes these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .loha import uniform
from .lowrank import Projections, with_bank
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class Lily(Method):
    """Low-rank interconnected adaptation across layers (Zhong et al. 2024, arXiv 2407.09946).

        y = W x + b + s · Σ_e p_e B_e z,   z = A x,   p = softmax(R z),   A (r, in), B_e (out, r), R (experts, r)

    Maps of one role, tower and size share all B_e; those of `stride` layers, counted from the first, share A; R is
    each map's own.

    at       linear maps; default 'attn.{q,v}'
    r        32 by default, as in Hugging Face PEFT: two to four times LoRA's, since fewer are trained
    experts  how many B; 2 by default, as in PEFT (it advises a half to a quarter of the layers). With one, R has nothing
             to learn
    stride   1 by default, as in PEFT (it advises 2 to 4)
    scale    s; 1 by default, as in PEFT
    per      'token' (default): p is each token's own. 'batch': one p, the mean over all tokens of the call, as PEFT has it.
             Then a row's result depends on the others, on padding and on how a text is cut for a cache, and rows cannot
             be routed

    B is zero at the start. p depends on x, so it does not merge; a gate's constant cannot be folded into a B that others
    share. A tied tensor is changed at the named map alone.

    Parameters: r in a stride, experts · r out once, r · experts a map. Raises: PlanError.
    """

    name = "lily"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2407.09946"
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed")
    tied = False

    r: int = 32
    experts: int = 2
    stride: int = 1
    scale: float = 1.0
    per: str = "token"
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, experts=self.experts, stride=self.stride)
        self._finite(scale=self.scale)
        self._one_of(("token", "batch"), per=self.per)
        self._pattern()
        object.__setattr__(self, "routable", self.per == "token")

    def names(self, site: Site) -> tuple[str, str]:
        """What the bank calls the site's A and B."""
        kind = re.sub(r"\W", "_", f"{site.tower}_{site.role or site.path.rpartition('.')[2]}_{site.out}x{site.inp}")
        return f"A_{kind}_{(site.layer or 0) // self.stride}", f"B_{kind}"

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        yield from with_bank(self, sites, build, lambda chosen: Shared(self, chosen, build))

    def part(self, site: Site, build: Build) -> Part:
        return LilyPart(site, build, self)


class Shared(Projections):
    """A (r, in) of every stride, and B (experts, r, out) of every role."""

    def __init__(self, m: Lily, chosen: list[Site], build: Build) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in chosen:
            a, b = m.names(site)
            shapes |= {a: (m.r, site.inp), b: (m.experts, m.r, site.out)}
        super().__init__(build, trained=tuple(shapes), **shapes)
        with torch.no_grad():
            for name in shapes:
                if name.startswith("A_") and not build.blank:
                    uniform(getattr(self, name))

    def unfold(self, saved: dict[str, Any]) -> None:
        """Take those of maps that vn.settle dropped, too."""
        for name, t in saved.items():
            if not hasattr(self, name) and name.isidentifier() and name[:2] in ("A_", "B_"):
                self.trained += (name,)
                self._hold(name, tuple(t.shape))


class LilyPart(MapPart):
    def __init__(self, site: Site, build: Build, m: Lily) -> None:
        super().__init__(site, build)
        if self.map.read_by_others:
            raise PlanError("Lily: the model reads this weight itself, and it depends on x here", where=site.path, fix="Leave it out: at='…,!name:…'")
        self.R = nn.Parameter(uniform(torch.empty(m.experts, m.r, **like(build, site))))
        self.scale, self.names, self.whole = m.scale, m.names(site), m.per == "batch"

    def shared(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        a, b = (getattr(self.bank, name).to(self.R.device) for name in self.names)
        return a, b

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = (self.cast(t, h) for t in self.shared())
        z = nn.functional.linear(x.to(h.dtype), a)
        p = nn.functional.linear(z, self.cast(self.R, h)).softmax(-1)
        if self.whole:
            return self.scale * (z @ torch.einsum("e,ero->ro", p.flatten(0, -2).mean(0), b))
        # one product with all B: z of each expert, times its share
        return (self.scale * p.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2) @ b.flatten(0, 1)
