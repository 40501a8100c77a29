"""LoftQ: LoRA that starts from the error of quantising its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import CapabilityError
from ..ops.rounding import ROUNDINGS
from ..ops.weights import plain
from ..sites import Site
from .base import Build
from .factors import LoRAPart
from .lora import LoRA
from .matrices import svd, wide
from .part import Part
from .starts import Start


def residual(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """s B A = the best rank-r approximation of W - Q(W)."""
    for p in parts:
        u, s, v = svd(-wide(p.shift), p.A.shape[-2], m.niter)
        root = (s / p.scale).sqrt()
        p.begin(root.unsqueeze(-1) * v, u * root.unsqueeze(-2))


@dataclass(frozen=True)
class LoftQ(LoRA):
    """LoRA-fine-tuning-aware quantisation (Li et al., ICLR 2024, arXiv 2310.08659).

        y = Q(W) x + b + s · B A x,   s B A ≈ W - Q(W) at the start, its best approximation of rank r

    The start is the base as it was before quantisation, as closely as rank r can make up for the error.

    Attach it to the unquantised base, which alone has W. There Q(W) is simulated: the deviation from W is
    (Q(W) - W) x + s B A x, with one dense matrix more a site in memory, and training is that on a quantised base. Save
    it, and load it on the base loaded in those bits (vn.load(..., check_base=False)): there Q(W) is the base itself,
    and the deviation s B A x alone. Merging folds what was trained into the unquantised weights: Q(W) + s B A.

    quantiser  'nf4' (default; blocks of 64, as bitsandbytes'), 'int4' (the same blocks, even steps), 'int8' (a scale a row)

    One round of the paper's alternation: further ones quantise W less the last round's B A, which is no longer what a
    base loaded in few bits is. `init` is 'loftq' alone, the one entry of its `starts`. As LoRA's are at, r, alpha, dropout,
    rank_stabilized, b_rate, freeze_a, ranks, alphas, tied, rho and niter.

    Parameters: r (in + out) for each map. Raises: CapabilityError on a base that is quantised already; PlanError.
    """

    name = "loftq"
    holds = ""
    paper = "arXiv 2310.08659"
    identity_at_init = False
    starts: ClassVar[dict[str, Start]] = {"loftq": Start(residual)}

    init: str = "loftq"
    quantiser: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of(ROUNDINGS, quantiser=self.quantiser)

    def part(self, site: Site, build: Build) -> Part:
        return LoftQPart(site, build, self)


class LoftQPart(LoRAPart):
    shift: Tensor | None
    factors = None  # type: ignore[assignment]  # its deviation is not low-rank alone

    def __init__(self, site: Site, build: Build, m: LoftQ) -> None:
        super().__init__(site, build, m)
        p = self.module._parameters.get(site.tensor or "weight")
        shift = None
        if p is not None and p.is_floating_point() and plain(p, site):
            w = wide(self.weight())
            shift = (ROUNDINGS[m.quantiser](w) - w).to(self.new["dtype"])
        elif not build.blank:
            raise CapabilityError(
                "LoftQ starts from the weights before quantisation, and these are quantised already",
                where=site.path,
                fix="Attach it to the unquantised base, save it, and load it here",
            )
        self.register_buffer("shift", shift, persistent=False)  # a function of the base, so the file need not hold it

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        low = super().deviation(x, h)
        return low if self.shift is None else low + self.map.apply(x, self.cast(self.shift, h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d, _ = super().fold(w, b)
        return d if self.shift is None else d + self.shift.to(w.dtype), None

    def scale_by(self, c: float) -> bool:
        return super().scale_by(c) if self.shift is None else False
