"""Gradient: the entries with the largest gradients get a delta."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Build
from .sparse import Sparse, SparsePart


@dataclass(frozen=True)
class GradientMask(Sparse):
    """Sparse deltas where the loss pulls most (SHiRA's Grad and SNIP masks, Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175).

        y = (W + S) x + b,   S trained where |∂L/∂W|, or |W · ∂L/∂W|, is largest on the batches given, zero elsewhere

    share   of the chosen maps' entries, all together; 0.005 by default (the middle of the papers' 0.1 to 2 %)
    k       their number instead
    per     share, or k, of the 'model' (default: the best entries, wherever they are) or of each 'matrix'
    at      any maps; default 'linear'
    criterion  'grad' (default) or 'snip', which weighs the gradient by the weight (Lee et al. 2019, arXiv 1810.02340)

    Give some hundred examples: vn.attach(model, plan, batches=batches). One gradient is held for each chosen matrix while
    choosing. S is zero at the start. Parameters: k (and k frozen int32 places). Raises: PlanError without batches;
    CapabilityError where a weight has no gradient (quantised).
    """

    name = "gradient"
    paper = "arXiv 2406.13175"
    needs_data = True

    criterion: str = "grad"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of(("grad", "snip"), criterion=self.criterion)

    def choose(self, parts: list[SparsePart], build: Build) -> None:
        found = build.data("GradientMask").gradients([p.site for p in parts])

        def score(i: int) -> Tensor:
            g = parts[i].map.canonical(found[i]).abs()
            return g * parts[i].weight().abs().to(g) if self.criterion == "snip" else g

        self.deal(parts, score)
