"""Reading: a plan from plain data, strictly. Every composition says once how it is written."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import PlanError, did_you_mean
from .plan import OPTIONS, Plan, gated, short

DEEPEST = 32  # plans within plans


@dataclass(frozen=True)
class Composer:
    """How a plan that wraps others is written as data: {head: plan or list of plans, option: …}."""

    make: Callable[..., Plan]
    options: tuple[str, ...] = ()
    many: bool = False  # takes a list of plans
    named: bool = False  # takes a name, of a trained adapter


def _composers() -> dict[str, Composer]:
    from .compose import COMPOSERS

    return {"sum": Composer(lambda *p: functools.reduce(operator.add, p), many=True),
            "stack": Composer(lambda *p: functools.reduce(operator.rshift, p), many=True),
            "gated": Composer(gated, OPTIONS), **COMPOSERS}  # fmt: skip


def parse(data: Any, where: str, depth: int = 0) -> Plan:
    """The plan that `data` describes: see Plan.from_dict."""
    from .methods import find
    from .presets import preset

    if isinstance(data, Plan):
        return data
    if isinstance(data, str):
        return preset(data, where)
    if depth > DEEPEST:
        raise PlanError(f"plans are nested more than {DEEPEST} deep", where=_head(where))
    if isinstance(data, list):
        data = {"sum": data}
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a mapping, a list or a preset's name, not {short(data)}", where=where)
    composers = _composers()
    known = ("method", *composers)
    heads = [k for k in known if k in data]
    if len(heads) != 1:
        keys = short(list(data))[1:-1] or "nothing"
        unknown = next((k for k in data if k not in known), "")
        fix = did_you_mean(str(unknown), known) if not heads else "A plan within a plan is a mapping of its own"
        raise PlanError(f"a plan has exactly one of {', '.join(map(repr, known))}, not {keys}", where=where, fix=fix)
    head, rest = heads[0], {k: v for k, v in data.items() if k != heads[0]}
    if head == "method":
        return find(data["method"], where).from_fields(rest, where)
    c = composers[head]
    for key in rest:
        if key not in c.options:
            fix = did_you_mean(str(key), c.options) if c.options else f"{head!r} stands alone"
            raise PlanError(f"{head!r} has no option {short(key)}", where=where, fix=fix)
    given = data[head]
    if c.named:
        return _at(where, lambda: c.make(given, **rest))
    if not c.many:
        inside = parse(given, f"{where}.{head}", depth + 1)
        return _at(where, lambda: c.make(inside, **rest))
    if not isinstance(given, list) or not given:
        raise PlanError(f"{head!r} takes a list of plans, not {short(given)}", where=where)
    plans = [parse(m, f"{where}.{head}[{i}]", depth + 1) for i, m in enumerate(given)]
    return _at(where, lambda: c.make(*plans, **rest))


def _head(where: str) -> str:
    return where if len(where) <= 80 else where[:79] + "…"


def _at(where: str, make: Callable[[], Plan]) -> Plan:
    """What `make` gives; its refusals say where in the data they arose."""
    try:
        return make()
    except PlanError as e:
        raise e if e.where else PlanError(e.what, where=where, fix=e.fix) from None
