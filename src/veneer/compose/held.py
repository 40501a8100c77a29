"""Trained adapters within new plans: taken by name, copied, and held while the rest trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plan import Gate, Plan, Term, check_plan, short

if TYPE_CHECKING:
    from ..methods.base import Method


@dataclass(frozen=True)
class Frozen(Plan):
    """A plan that is saved with the adapter and not trained; made by `vn.frozen`, and by `vn.use` when it is attached."""

    plan: Plan

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        for t in self.plan.terms(stage, gate):
            yield replace(t, held=True)

    def inside(self) -> tuple[Plan, ...]:
        return (self.plan,)

    def rebuild(self, members: list[Plan]) -> Plan:
        return Frozen(members[0])

    def to_dict(self) -> dict[str, Any]:
        return {"frozen": self.plan.to_dict()}

    def __str__(self) -> str:
        return f"frozen({self.plan})"

    __repr__ = __str__


def frozen(plan: Plan) -> Plan:
    """`plan`, saved with the adapter and not trained. Gates over it do train. Raises: PlanError for what is no plan."""
    check_plan(plan, "frozen")
    return Frozen(plan)


@dataclass(frozen=True)
class Use(Plan):
    """Stands for a trained adapter until the plan is attached; made by `vn.use`."""

    name: str
    train: bool = False

    def unresolved(self) -> bool:
        return True

    def _early(self) -> PlanError:
        return PlanError(
            f"the adapter {self.name!r} is taken from a model when the plan is attached",
            fix="Attach the plan to the model that has it, or write its plan out",
        )

    def leaves(self) -> Iterator[Method]:
        raise self._early()

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        raise self._early()

    def to_dict(self) -> dict[str, Any]:
        return {"use": self.name} | ({"train": True} if self.train else {})

    def __str__(self) -> str:
        return f"use({self.name!r}{', train=True' if self.train else ''})"

    __repr__ = __str__


def use(name: str, *, train: bool = False) -> Plan:
    """A trained adapter, by the name under which it is attached to the model, as a part of a new plan.

        vn.attach(model, vn.use("chichewa") >> vn.Bottleneck(48), name="task")      # MAD-X: a task over a language
        vn.attach(model, vn.fuse(vn.use("sst2"), vn.use("mnli")), name="both")      # AdapterFusion
        vn.attach(model, vn.gated(vn.use("sst2") + vn.use("mnli")), name="which")   # learnt gates over trained adapters

    When the plan is attached, the adapter's plan takes the place of `use`, with a copy of its numbers; the adapter itself
    stays as it is. The copy is saved with the new adapter, whose file so needs no other.

    train  train the copy too; False (default): it is held

    An adapter that has gates goes beside other plans, not under another gate.
    Raises: PlanError for a name that is none; AdapterError, on attaching, for one that is not attached.
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"use takes the name of an adapter, not {short(name)}", fix="For example vn.use('sst2')")
    return Use(name, bool(train))


def written_out(plan: Plan, find: Callable[[str], Any]) -> tuple[Plan, list[Any]]:
    """`plan` with every `use` written out, and for each of its terms None, or whose numbers it takes: (record, term).

    find  name -> the attached adapter's record
    """
    sources: list[Any] = []

    def walk(p: Plan, scaled: bool = False) -> Plan:
        if isinstance(p, Use):
            if p.train and scaled:
                raise PlanError(f"{p} under a gate would lose its own scale", fix=f"Hold it: vn.use({p.name!r}); or mix it with vn.mixture")
            record = find(p.name)
            sources.extend((record, i) for i, _ in enumerate(record.plan.terms()))
            return record.plan if p.train else Frozen(record.plan)
        inside = p.inside()
        if not inside:
            sources.extend(None for _ in p.terms())
            return p
        return p.rebuild([walk(m, scaled or getattr(p, "takes_scale", False)) for m in inside])

    return walk(plan), sources


def copy_numbers(parts: list[Any], sources: list[Any]) -> None:
    """Give the parts of terms that have a source, made blank, the numbers of its parts, gates included."""
    for i, source in enumerate(sources):
        if source is None:
            continue
        record, term = source
        mine, theirs = ([p for p in ps if p.term == n] for ps, n in ((parts, i), (record.parts, term)))
        for to, of in zip(mine, theirs, strict=True):
            values = {key: value.detach().clone() for key, value in of.tensors(fold=True).items()}
            if hasattr(to, "unfold"):
                to.unfold(values)
            # a gate of the new plan is not among them
            to.load_state_dict(values, strict=False, assign=True)
        for to in mine:
            to.derive()
