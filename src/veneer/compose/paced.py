"""Learning rates of their own for the methods of one plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError
from ..plan import Gate, Plan, Term, check_plan, finite, short


@dataclass(frozen=True)
class Paced(Plan):
    """A plan that is trained at a multiple of the run's learning rate; made by `vn.paced`."""

    plan: Plan
    by: float = 1.0

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        for t in self.plan.terms(stage, gate):
            yield replace(t, pace=t.pace * self.by)

    def inside(self) -> tuple[Plan, ...]:
        return (self.plan,)

    def rebuild(self, members: list[Plan]) -> Plan:
        return Paced(members[0], self.by)

    def to_dict(self) -> dict[str, Any]:
        return {"paced": self.plan.to_dict(), "by": self.by}

    def __str__(self) -> str:
        return f"paced({self.plan}, {self.by:g})"

    __repr__ = __str__


def paced(plan: Plan, by: float | None = None) -> Plan:
    """`plan`, trained at `by` times the run's learning rate: vectors want a hundred times what matrices want.

        lr of a method's tensors = run's lr · by                      (nested: the product)
        by = None: for each method m in it,  by_m = rate_m / min over its methods of rate

    where rate is what each method declares for itself, from its paper: LoRA and the bottleneck 5e-4, (IA)3 3e-3, a
    prefix 5e-3, a fresh head 1e-3. The run's default rate is the smallest of a plan's, so in
    `vn.paced(vn.LoRA(8) + vn.IA3())`, trained without a rate given, each has the one of its paper. LoRA+ (Hayou et al. 2024,
    arXiv 2402.12354) does the like within one method. Gates keep the run's rate, or `vn.gated(…, rate=…)` times it.

    by   a positive number; None: as above

    vn.param_groups gives it to any optimiser; `veneer train`, vn.adamw and a race use that.
    Raises: PlanError for what is no plan, or a `by` that is not positive.
    """
    check_plan(plan, "paced")
    if by is None:
        from ..train.rates import rate_of

        return _each(plan, rate_of(plan))
    if not finite(by) or by <= 0:
        raise PlanError(f"paced: by is {short(by)}", fix="Give a positive multiple of the learning rate, as 10")
    return Paced(plan, float(by))


def _each(plan: Plan, least: float) -> Plan:
    """`plan` with every method paced by what it declares, over `least`."""
    inside = plan.inside()
    if inside:
        return plan.rebuild([_each(p, least) for p in inside])
    by = float(f"{next(plan.leaves()).rate[0] / least:.6g}")
    return plan if by == 1 else Paced(plan, by)
