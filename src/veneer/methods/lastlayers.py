"""Last layers: the top of the model is trained whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..sites import Site
from .base import Build, Method
from .full import FullPart
from .part import Part, module_at


@dataclass(frozen=True)
class LastLayers(Method):
    """Ordinary fine-tuning of the last n layers of every tower, and of the head (Lee et al. 2019, arXiv 1911.03090).

        y = f(x; θ_base, θ'_last),   θ' = θ at the start

    n      layers, from the end; 1 by default (the paper: a quarter of them comes near full fine-tuning)
    head   train the head too; on by default, where there is one

    Parameters: as many as those layers have; nothing below them needs a gradient, so a step is cheaper, too.
    Raises: PlanError, SiteError.
    """

    name = "last-layers"
    family = "selective"
    ports = ("param",)
    paper = "arXiv 1911.03090"
    mergeable = True

    n: int = 1
    head: bool = True

    def __post_init__(self) -> None:
        self._positive(n=self.n)
        self._bool(head=self.head)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        for site in sites(None, "param", f"all@-{self.n}:" + (",head" if self.head else "")):
            if module_at(build.model, site.path)._parameters[site.tensor].is_floating_point():  # type: ignore[union-attr]
                yield site, FullPart(site, build)
