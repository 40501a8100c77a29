"""Lottery tickets: all entries train for a while, and those that moved most start again alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build
from .part import like
from .sparse import Sparse, SparsePart


@dataclass(frozen=True)
class LotteryTicket(Sparse):
    """Lottery-ticket sparse fine-tuning (LT-SFT, Ansell et al., ACL 2022, arXiv 2110.07560).

        y = (W + D) x + b   for the first steps;   then   y = (W + S) x + b,   S where |D| is largest, from zero again

    share   of the chosen maps' entries, all together; 0.005 by default (the middle of the papers' 0.1 to 2 %)
    k       their number instead
    per     share, or k, of the 'model' (default: the best entries, wherever they are) or of each 'matrix'
    at      any maps; default 'linear'
    first   the share of the steps with all of D; 0.5 by default (the paper trains both phases alike)

    The first phase needs the memory of full fine-tuning of the chosen maps; the second, and the file from then on, k numbers.
    The training loop says when: vn.advance(model, step, total, optimiser), as the library's Trainer does. Sparse adapters
    of a language and of a task add: vn.activate(model, ["sw", "ner"]), the paper's use. Parameters: all entries, then k.
    Raises: PlanError; AdapterError from vn.advance without the optimiser, whose parameters change.
    """

    name = "lottery"
    paper = "arXiv 2110.07560"

    first: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share(first=self.first)

    def part(self, site: Site, build: Build) -> LotteryPart:
        return LotteryPart(site, build)

    def choose(self, parts: list[SparsePart], build: Build) -> None:
        pass  # not before the first phase is over

    def renews(self, step: int, total: int) -> bool:
        return step == max(1, round(self.first * total))

    def advance(self, parts: list[LotteryPart], step: int, total: int) -> None:  # type: ignore[override]
        if self.renews(step, total) and all(p.dense is not None for p in parts):
            with torch.no_grad():
                self.deal(parts, lambda i: parts[i].dense.abs())  # type: ignore[union-attr]


class LotteryPart(SparsePart):
    """dense is D, in the first phase; then None."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.dense: nn.Parameter | None = nn.Parameter(torch.zeros(self.shape, **like(build, site)))
        self.values = None  # type: ignore[assignment]
        self.register_buffer("index", None)

    def hold(self, index: Tensor) -> None:
        assert self.dense is not None
        self.index = index.sort().values.to(self.dense.device, torch.int32)
        self.values, self.dense = nn.Parameter(self.dense.new_zeros(len(index))), None

    def delta(self) -> Tensor:
        return super().delta() if self.dense is None else self.dense

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return super().deviation(x, h) if self.dense is None else self.map.apply(x, self.cast(self.dense, h))

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """What is saved is D, or the entries that are left of it."""
        index = saved.get("index")
        if index is not None and index.dim() == 1 and self.dense is not None:
            self.hold(torch.zeros(len(index), dtype=torch.long, device=self.dense.device))
        elif "dense" in saved and self.dense is None:
            self.dense = nn.Parameter(self.values.new_zeros(self.shape))
            self.values = self.index = None  # type: ignore[assignment]

    def flaw(self) -> str:
        return super().flaw() if self.dense is None else ""

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            (self.values if self.dense is None else self.dense).mul_(c)
        return True
