"""RandomMask: entries drawn at random get a delta."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Build
from .fourierft import drawn
from .sparse import Sparse, SparsePart


@dataclass(frozen=True)
class RandomMask(Sparse):
    """Sparse deltas at random entries (SHiRA's Rand mask, Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175).

        y = (W + S) x + b,   S trained at k random places, zero elsewhere

    share   of the chosen maps' entries, all together; 0.005 by default (the middle of the papers' 0.1 to 2 %)
    k       their number instead
    per     share, or k, of the 'model' (default: the best entries, wherever they are) or of each 'matrix'
    at      any maps; default 'linear'
    r       entries as many as a LoRA of this rank has numbers: k = r (in + out) for each matrix, as Hugging Face PEFT counts
    seed    of the draw; 0 by default. The places are saved, so a file does not depend on it

    S is zero at the start. Parameters: k (and k frozen int32 places). Two such adapters add. Raises: PlanError.
    """

    name = "random"
    paper = "arXiv 2406.13175"

    r: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._finite(seed=self.seed)
        if self.r is not None:
            self._positive(r=self.r)

    def choose(self, parts: list[SparsePart], build: Build) -> None:
        for i, part in enumerate(parts):
            site = part.site
            whole = sum(p.entries for p in parts)
            n = self.r * (site.inp + site.out) if self.r else self.k or round(self.share * part.entries)
            if self.k and not self.r and self.per == "model":
                n = round(self.k * part.entries / whole)
            n = max(1, n)
            if n > part.entries:
                raise self._fail(f"{n} entries of the {part.entries} of {site.path}", "Choose fewer")
            part.hold(drawn(n, part.entries, self.seed + i, torch.device("cpu")).long())
