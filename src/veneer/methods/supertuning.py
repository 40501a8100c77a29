"""Super-tuning: the largest entries of each matrix, and beside them, if wished, a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..sites import Site
from .base import Build, Method
from .lora import LoRA
from .magnitude import Magnitude
from .part import Part


@dataclass(frozen=True)
class SuperTuning(Magnitude):
    """Super and Supra: sparse deltas at each matrix's largest weights, with or without LoRA (arXiv 2607.09287).

        y = (W + S) x + b + s · B A x,   S trained where |W| is largest, s = alpha / r

    share     of each matrix's entries; 0.01 by default, as in Hugging Face PEFT (its sparsity of 0.99)
    r         rank of the LoRA beside S (Supra); None (default): S alone (Super)
    alpha     2 r by default (PEFT's). Under a gate s = 1, as for vn.LoRA
    dropout   on x before A, while training; 0 by default
    smallest, k, per, at   as for vn.Magnitude, but for per: each 'matrix' has its share here

    S and B are zero at the start. Parameters: share · in · out + r (in + out) a map (and as many frozen int32 places as S has
    entries). The paper also ranks entries by |W| times their inputs' norm (Wanda), which it finds no better. Raises: PlanError.
    """

    name = "super"
    paper = "arXiv 2607.09287"

    share: float = 0.01
    per: str = "matrix"
    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and (self.alpha is not None or self.dropout):
            raise self._fail("alpha and dropout are the LoRA's, and r is None", "Give r as well: vn.SuperTuning(r=8)")
        self._beside()

    def _beside(self) -> LoRA | None:
        return None if self.r is None else LoRA(self.r, alpha=self.alpha, dropout=self.dropout, at=self.at or self.default_at)

    def counts(self, sizes: list[int], scores: Callable[[int], Any]) -> list[int]:
        # downwards, as PEFT counts them
        return [max(1, int(self.share * n)) for n in sizes] if self.per == "matrix" and self.k is None else super().counts(sizes, scores)

    def ungated(self) -> Method:
        return replace(self, alpha=self.r)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        yield from super().parts(sites, build)
        lora = self._beside()
        if lora is not None:
            yield from lora.parts(sites, build)
