"""Learning rates by method, where a configuration gives none."""

from __future__ import annotations

from ..plan import Plan

# AdamW. Light methods want more than full fine-tuning's 2e-5 (UniPELT: 2e-4 to 5e-4 for its submodules and 5e-4 for all
# together), and the fewer parameters a method has, the more: (IA)3 3e-3 as T-Few; soft prompts 1e-2, between P-tuning v2's
# 5e-3 to 1e-2 for prefixes and prompt tuning's 0.3 with Adafactor.
RATES = {"lora": 5e-4, "bottleneck": 5e-4, "prefix": 5e-3, "prompt": 1e-2, "ia3": 3e-3, "bitfit": 1e-3, "full": 1e-3}
DEFAULT = 5e-4


def rate_of(plan: Plan) -> float:
    """The default rate of `plan`: the smallest among its methods'; a head's own counts only where it is alone."""
    names = [m.name for m in plan.leaves()]
    body = [n for n in names if n != "full"] or names
    return min(RATES.get(n, DEFAULT) for n in body)
