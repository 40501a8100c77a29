"""(IA)3: keys, values and the FFN's inner activation are rescaled by learnt vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import InputPart, MapPart

INNER = "ffn.down"


@dataclass(frozen=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al., NeurIPS 2022, arXiv 2205.05638).

        y = l ⊙ (W x + b)  on outputs (keys, values);   y = W (l ⊙ x) + b  on inputs (the FFN's inner activation)

    l is 1 at the start. At 'ffn.down' the input is rescaled, which is the FFN's inner activation; elsewhere the output.

    at        default 'attn.{k,v},cross.{k,v},ffn.down': the paper's three vectors a block, cross-attention's too
    on        'auto' (as above), 'output' or 'input' for all sites of `at`

    Parameters: one vector a site. Merged by scaling rows or columns: no latency. Raises: PlanError.
    """

    name = "ia3"
    family = "scaling"
    ports = ("weight",)
    paper = "arXiv 2205.05638"
    mergeable = True
    default_at = "attn.{k,v},cross.{k,v},ffn.down"
    rate = (3e-3, "T-Few, 3e-3 (Liu et al. 2022)")

    at: str | None = None
    on: str = "auto"

    def __post_init__(self) -> None:
        self._one_of(("auto", "output", "input"), on=self.on)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        chosen = sites(self.at, "weight", self.default_at)
        covered: dict[tuple[str, str], int] = {}
        for site in chosen:
            covered[site.path, site.tensor] = covered.get((site.path, site.tensor), 0) + site.out
        seen = set()  # slices of one map share its input
        for site in chosen:
            build.module = module_at(build.model, site.path)
            part = self.part(site, build)
            whole = site.slice is None or covered[site.path, site.tensor] == site.slice.groups * site.slice.stride
            if part.acts == "input" and not whole:
                raise self._fail(
                    f"the input of {site.path} is shared with other projections than {site.role}",
                    "Choose all slices of the fused projection, or on='output'",
                )
            key = (site.path, site.tensor, part.acts)
            if part.acts == "input" and key in seen:
                continue
            seen.add(key)
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        inward = self.on == "input" or (self.on == "auto" and site.role == INNER)
        # an embedding has no input to scale, and a tensor that the model reads itself is scaled as a matrix
        return IA3In(site, build) if inward and site.kind != "embedding" else IA3Out(site, build)


class IA3Out(MapPart):
    """dy = (l - 1) ⊙ y."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        lead = (site.experts,) if site.experts else ()
        self.l = nn.Parameter(torch.ones(*lead, site.out, **like(build, site)))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.features(self.cast(self.l, h) - 1, h) * h

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = (self.l - 1).to(w.dtype)
        return d.unsqueeze(-1) * w, None if b is None else d * b

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.l.copy_(1 + c * (self.l - 1))
        return True


class IA3In(InputPart):
    """dx = (l - 1) ⊙ x."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.map.slice = None  # the input is the whole map's
        lead = (site.experts,) if site.experts else ()
        self.channels = site.inp
        kernel = getattr(self.map, "kernel", ())
        for k in kernel:  # a convolution's input has channels; its matrix has channels x kernel columns
            self.channels //= k
        self.repeat = site.inp // self.channels
        groups = getattr(self.map, "groups", 1)
        self.l = nn.Parameter(torch.ones(*lead, self.channels * groups, **like(build, site)))

    def inward(self, x: Tensor) -> Tensor:
        return self.map.features(self.cast(self.l, x) - 1, x) * x

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = (self.l - 1).to(w.dtype)
        if self.repeat > 1 or d.shape[-1] != w.shape[-1]:
            groups = d.shape[-1] // self.channels
            d = d.reshape(groups, self.channels).repeat_interleave(self.repeat, 1)
            d = d.repeat_interleave(w.shape[0] // groups, 0)
            return d * w, None
        return d.unsqueeze(-2) * w, None

    scale_by = IA3Out.scale_by
