"""Fisher: the entries that the base's answers depend on most get a delta."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Build
from .sparse import Sparse, SparsePart


@dataclass(frozen=True)
class FisherMask(Sparse):
    """Fisher-induced sparse unchanging mask (FISH, Sung et al., NeurIPS 2021, arXiv 2111.09839).

        y = (W + S) x + b,   S trained where F = mean over examples of (∂L/∂W)² is largest, zero elsewhere

    share   of the chosen maps' entries, all together; 0.005 by default (the middle of the papers' 0.1 to 2 %)
    k       their number instead
    per     share, or k, of the 'model' (default: the best entries, wherever they are) or of each 'matrix'
    at      any maps; default 'linear'

    F is the empirical Fisher information, from one backward pass for each example of the batches given; the paper uses 128
    to 1024 examples: vn.attach(model, plan, batches=batches). S is zero at the start. Parameters: k (and k frozen int32
    places). Raises: PlanError without batches; CapabilityError where a weight has no gradient (quantised).
    """

    name = "fisher"
    paper = "arXiv 2111.09839"
    needs_data = True

    def choose(self, parts: list[SparsePart], build: Build) -> None:
        found = build.data("FisherMask").squares([p.site for p in parts])
        self.deal(parts, lambda i: parts[i].map.canonical(found[i]))
