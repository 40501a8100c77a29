"""How far two models' outputs lie apart: every file that is written for another reader is measured with this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import disabled
from ..errors import MergeError


@dataclass
class Difference:
    """|a - b| of two outputs on the same input.

    largest   max |a - b|
    relative  ‖a - b‖ / ‖a‖
    agree     share of positions whose largest entry is the same
    effect    max |a - base|: what the adapter itself does to the output; None where the base's was not given
    """

    largest: float
    relative: float
    agree: float
    effect: float | None = None

    def __str__(self) -> str:
        own = "" if self.effect is None else f"; the adapter itself changes it by up to {self.effect:.3g}"
        return f"output differs by at most {self.largest:.3g} (relative {self.relative:.2g}, same top entry at {100 * self.agree:.1f}%){own}"


def difference(a: Tensor, b: Tensor, base: Tensor | None = None) -> Difference:
    """How `b` differs from `a`. Raises: MergeError where they have not the same shape, or one is not a number."""
    if a.shape != b.shape:
        raise MergeError(f"the outputs have shapes {list(a.shape)} and {list(b.shape)}", fix="They are not of the same model")
    a, b = a.double(), b.double()
    if not torch.isfinite(a).all() or not torch.isfinite(b).all():
        raise MergeError("the output has NaN or infinity", fix="Train again, or take an earlier checkpoint")
    return Difference(
        float((a - b).abs().max()),
        float((a - b).norm() / a.norm().clamp(min=1e-30)),
        float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        None if base is None else float((a - base.double()).abs().max()),
    )


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the last hidden state where there is no head, in eval mode."""
    before = model.training
    try:
        out = model.eval()(**inputs)
    finally:
        model.train(before)
    for key in ("logits", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out[0]


def with_and_without(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output with the active adapters, and the base's."""
    adapted = output(model, inputs)
    with disabled(model):
        return adapted, output(model, inputs)
