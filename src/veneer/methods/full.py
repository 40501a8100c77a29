"""Full: the tensors themselves, trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import TensorPart


@dataclass(frozen=True)
class Full(Method):
    """Ordinary fine-tuning of some tensors: each is replaced by a trained copy, and the base keeps its own.

        y = f(x; θ'),   θ' = θ at the start

    at        which modules' tensors: 'head' for a freshly initialised head, 'norm', 'ffn.*@-1:', 'all', …

    tied      a tensor that several modules hold stays one: its copy is used by all of them. False: by the named one alone,
              as with Hugging Face PEFT's modules_to_save, and then it cannot be merged

    The copies are saved whole, so a head that was initialised at random is the same after loading on a base whose head
    came out otherwise. Parameters: as many as the tensors have. Raises: SiteError.
    """

    name = "full"
    family = "selective"
    ports = ("param",)
    paper = ""
    mergeable = True
    holds = "tensor"
    default_at = "head"
    rate = (1e-3, "a fresh head on a frozen body, as linear probes take")
    leads = False

    at: str | None = "head"
    tied: bool = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._bool(tied=self.tied)
        self._pattern()

    def default_rate(self) -> tuple[float, str]:
        return self.rate if self.at == self.default_at else (5e-5, "ordinary fine-tuning, 2e-5 to 5e-5 (Devlin et al. 2019, A.3)")

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        for site in sites(self.at, "param", self.default_at):
            if module_at(build.model, site.path)._parameters[site.tensor].is_floating_point():  # type: ignore[union-attr]
                yield site, FullPart(site, build)


class FullPart(TensorPart):
    """p' is the trained copy itself."""

    replaces = True

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site)
        p = module_at(build.model, site.path)._parameters[site.tensor]
        assert p is not None
        self.tensor = nn.Parameter(p.detach().to(**like(build, site), copy=True))

    def value(self, p: Tensor) -> Tensor:
        return self.cast(self.tensor, p)

    def scale_by(self, c: float) -> bool:
        return c == 1.0

    def add(self, delta: Tensor) -> None:
        """Make p' of p' + delta."""
        self.tensor.add_(delta.to(self.tensor))
