"""Low-rank parts: dW = s · B A, from whatever factors the method makes, applied without ever building dW."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .parts import MapPart


class LowRankPart(MapPart):
    """dy = s · B A x, with A (r, in) and B (out, r) from `pair`; experts have a leading E.

    Vectors that scale rank or features belong in `pair`: scaling a factor costs r (in + out) numbers, scaling the
    activations r or out numbers for every token. Given factors, vn.optimize runs any such part with its map.
    """

    scale: float = 1.0
    dropout: float = 0.0

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they are now, in the parameters' dtype."""
        raise NotImplementedError

    def entry(self, x: Tensor) -> Tensor:
        """What A is applied to."""
        if self.dropout and self.training and x.is_floating_point():
            return nn.functional.dropout(x, self.dropout)
        return x

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the deviation s · B A entry(x), in x's dtype."""
        a, b = self.pair()
        return self.cast(a, x), self.cast(b, x), self.scale

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair()
        z = self.map.down(self.entry(x), self.cast(a, h))
        return self.map.up(z * self.scale if self.scale != 1 else z, self.cast(b, h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = self.pair()
        return self.scale * (up.to(w.dtype) @ down.to(w.dtype)), None

    def _scaled(self, c: float, *names: str) -> bool:
        with torch.no_grad():
            for name in names:
                getattr(self, name).mul_(c)
        return True


def check_rank(who: str, r: int, site: Site) -> None:
    """Raise PlanError where rank r is over that of the site's matrix."""
    full = min(site.out, site.inp)
    if r > full:
        raise PlanError(f"{who}: rank {r} is over the rank {full} of the {site.out} x {site.inp} matrix", where=site.path, fix=f"Use r={full} or less")
