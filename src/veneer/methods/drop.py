"""AdapterDrop: parts that are left out of the lowest layers, by a fixed number or one drawn for each training step."""

from __future__ import annotations

import random
from typing import Any

from .part import Part


class Droppable(Part):
    """A part that can be left out in the layers under `skip`; while training, under `drawn`, where `most` is given."""

    skip: int = 0
    most: int = 0
    drawn: int = 0

    def idle(self) -> bool:
        n = self.drawn if self.training and self.most else self.skip
        # asked only where layers are left out at all: a compiler would otherwise make one graph a layer
        return n > 0 and self.site.layer is not None and self.site.layer < n


def ready(part: Droppable, skip: int, most: int) -> None:
    """Give `part` its numbers. The first step leaves none out."""
    part.skip, part.most = skip, most


def draw(parts: list[Any], step: int) -> None:
    """Draw how many layers the step after `step` leaves out: 0 to `most`, but never a tower's topmost one, without which there
    might be nothing to train. From the step's number alone, so that all processes agree, a resumed run goes on as it would
    have, and a recomputed layer sees what it saw before."""
    top: dict[str, int] = {}
    for p in parts:
        top[p.site.tower] = max(top.get(p.site.tower, 0), p.site.layer or 0)
    for p in parts:
        p.drawn = random.Random(f"adapterdrop {step}").randint(0, min(p.most, top[p.site.tower]))
