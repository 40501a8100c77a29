"""Learning rates, where a configuration gives none: what the plan's methods declare."""

from __future__ import annotations

from ..plan import Plan


def rate_of(plan: Plan) -> float:
    """The default rate of `plan`: the smallest among its methods'; a fresh head's counts only where it is alone."""
    return choose(plan)[0]


def choose(plan: Plan) -> tuple[float, str]:
    """(rate, 'method: source') of the method that decides.

    Light methods want more than full fine-tuning's 2e-5, and the fewer parameters a method has, the more.
    """
    methods = [t.method for t in plan.terms() if not t.held] or list(plan.leaves())
    decides = min([m for m in methods if m.leads] or methods, key=lambda m: m.default_rate()[0])
    rate, source = decides.default_rate()
    return rate, f"{decides.name}: {source}"
