"""BitFit: the biases get a delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import TensorPart


@dataclass(frozen=True)
class BitFit(Method):
    """Bias-only fine-tuning (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

        y = f(x; b + δ),   δ = 0 at the start

    at        which modules' biases; default all of them (the paper's), norms' included, the head's excepted (give the
              head to vn.Full)

    Parameters: one for each bias. The delta rides in the base's own bias add: no extra operation. Raises: SiteError
    where the chosen modules have no bias, as in Llama.
    """

    name = "bitfit"
    family = "selective"
    ports = ("param",)
    paper = "arXiv 2106.10199"
    mergeable = True
    default_at = "all"
    rate = (1e-3, "BitFit, 1e-4 to 1e-2 (Ben Zaken et al. 2022)")

    at: str | None = None

    def __post_init__(self) -> None:
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        found = False
        for site in sites(self.at, "param", self.default_at):
            if site.tensor.split(".")[-1].endswith("bias") and (self.at is not None or site.role != "head"):
                found = True
                yield site, DeltaPart(site, build)
        if not found:
            where = f"at {self.at!r}" if self.at else "in this model"
            raise SiteError(f"BitFit: there is no bias {where}", fix="Use vn.IA3() or vn.LoRA() for a model without biases")


class DeltaPart(TensorPart):
    """p' = p + δ."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site)
        self.delta = nn.Parameter(torch.zeros(site.shape, **like(build, site)))

    def value(self, p: Tensor) -> Tensor:
        return p + self.cast(self.delta, p)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.delta.mul_(c)
        return True
