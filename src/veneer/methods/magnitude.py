"""Magnitude: the largest entries of each matrix get a delta."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Build
from .sparse import Sparse, SparsePart


@dataclass(frozen=True)
class Magnitude(Sparse):
    """Sparse deltas at the base's largest weights (SHiRA's WM mask, Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175).

        y = (W + S) x + b,   S trained where |W| is largest, zero elsewhere

    share   of the chosen maps' entries, all together; 0.005 by default (the middle of the papers' 0.1 to 2 %)
    k       their number instead
    per     share, or k, of the 'model' (default: the best entries, wherever they are) or of each 'matrix'
    at      any maps; default 'linear'
    smallest  choose the smallest |W| instead: weights that the base hardly uses; off by default

    S is zero at the start. Parameters: k (and k frozen int32 places). Two such adapters add. Raises: PlanError;
    CapabilityError where the base's weight cannot be had.
    """

    name = "magnitude"
    paper = "arXiv 2406.13175"

    smallest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bool(smallest=self.smallest)

    def scores(self, part: SparsePart, build: Build) -> Tensor:
        w = part.weight().abs().float()
        return -w if self.smallest else w
