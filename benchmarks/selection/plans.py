"""The rows of the evidence: plans, and the learning rates that each is tuned over."""

from __future__ import annotations

from typing import Any

HEAD = 1e-2  # the fresh head's rate in every row: at a method's own, 5e-4, LoRA's head had hardly moved after 320 steps on 20 newsgroups
GRID: dict[str, tuple[float, ...]] = {
    "full": (5e-5, 1e-4, 2e-4),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "bottleneck": (5e-4, 1e-3, 2e-3),
    "prefix": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 2e-3, 5e-3),
    "ia3": (1e-2, 3e-2, 6e-2),
    "unipelt-ap": (5e-4, 1e-3, 2e-3),
    "unipelt-apl": (5e-4, 1e-3, 2e-3),
    "gated": (5e-4, 1e-3, 2e-3),
}
METHODS = tuple(GRID)
SINGLE = ("bitfit", "bottleneck", "prefix", "lora", "ia3")
LIGHT = METHODS[1:]
OURS = "gated"
SETTLED = {"settled": "gated", "settled-apl": "unipelt-apl"}
VARIANTS = {"calibrated": ("gated", "calibrated", "layer"), "by-role": ("gated", "calibrated", "role")}  # settled by another guide, or in other groups
FOLDED = {"folded": "settled", "folded-apl": "settled-apl"}
ROWS = (*METHODS, *SETTLED, *VARIANTS, *FOLDED, "selected")


def plan_of(row: str, lr: float) -> Any:
    """The row's plan with a fresh head."""
    import veneer as vn

    body = vn.Full(at="all,!head") if row == "full" else vn.preset(row)
    return body + vn.paced(vn.Full(at="head"), HEAD / lr)
