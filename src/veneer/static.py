"""The static plan that settling leaves: its parts with constants in place of gates, or as attaching would start them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .ablate import constant
from .adapter import Record
from .build import make_parts
from .errors import AdapterError, PlanError
from .install import install, uninstall
from .plan import Gated, Plan
from .probe import Probe
from .sites import Site


def remember(model: nn.Module, state: Any, record: Record) -> Callable[[], None]:
    """A function that gives the record its parts, gates, numbers and plan of now back."""
    plan, parts = record.plan, list(record.parts)
    own = [(p, p.gate, p.published, p.term, p.stage, {k: v.detach().clone() for k, v in p.named_parameters()}) for p in parts]

    def undo() -> None:
        uninstall(model, state, record)
        for p, gate, p.published, p.term, p.stage, values in own:
            p.gate = gate
            with torch.no_grad():
                for k, v in p.named_parameters():
                    v.copy_(values[k])
        record.plan, record.parts = plan, parts
        install(model, state, record)
        state.refresh()

    return undo


def rebuild(model: nn.Module, state: Any, record: Record, stay: list[Any], means: dict[int, Any], batches: list[Any], seed: int | None) -> None:
    """Leave `stay` of the record's parts, under the static plan that describes them: with their gates' means folded in, or,
    where a `seed` is given, as vn.attach would start that plan. What is held (vn.frozen) is not trained, and keeps its numbers."""
    uninstall(model, state, record)
    fresh = [p for p in stay if seed is not None and not p.held]
    for p in stay:
        if any(p is q for q in fresh):
            p.gate = None
        elif p.gate is not None:
            mean, old = means[id(p)]["mean"], p.gate
            p.gate = None if p.scale_by(mean) else constant(old, mean)
            p.published = p.published and p.gate is not None
    record.parts = stay
    record.plan = _static(model, record.plan, stay)
    terms, old = list(record.plan.terms()), sorted({p.term for p in stay})
    for p in stay:
        p.term = old.index(p.term)
        p.stage = terms[p.term].stage
    again = [(q.site, q.method_name) for q in make_parts(model, record.plan, blank=True)]
    if again != [(p.site, p.method_name) for p in stay]:
        raise PlanError(f"what is left cannot be written as a plan of this model: {record.plan}", fix="Keep other groups")
    if fresh:
        state.refresh()
        record.parts = [new if any(p is q for q in fresh) else p for p, new in zip(stay, _started(model, state, record, stay, batches, seed), strict=True)]
    install(model, state, record)
    state.refresh()


def _started(model: nn.Module, state: Any, record: Record, stay: list[Any], batches: list[Any], seed: int | None) -> list[Any]:
    """The parts that vn.attach makes of the record's plan under torch.manual_seed(seed); the random state comes back."""
    if state.resting:
        raise AdapterError("the base's weights are in CPU memory (offload_base)", fix="vn.unoptimize(model) first, and optimise again afterwards")
    terms = list(record.plan.terms())
    held = [i for i, term in enumerate(terms) if term.held]
    probe = Probe(model, batches) if any(term.method.needs_data and not term.held for term in terms) else None
    first = next(q for p in stay for q in p.parameters())
    with torch.random.fork_rng(devices=[first.device] if first.device.type == "cuda" else []):
        torch.manual_seed(seed or 0)
        return make_parts(model, record.plan, first.dtype, probe=probe, copied=held)


def _static(model: nn.Module, plan: Plan, parts: list[Any]) -> Plan:
    """`plan` with only what `parts` hold: gates gone (or constant), and each method's `at` narrowed to its sites."""
    terms = iter(enumerate(plan.terms()))

    def walk(p: Plan) -> Plan | None:
        if p.inside():
            members = [q for m in p.inside() if (q := walk(m)) is not None]
            return p.dissolve(members) if members else None
        i, term = next(terms)
        mine = [q for q in parts if q.term == i and q.acts]
        if not mine:
            return None
        method = term.method
        if term.gate is not None:
            method = method.ungated() if term.unscaled else method
            sites = [q.site for q in mine]
            at = narrow(model, sites)
            if len(mine) != term_count[i]:
                method = dataclasses.replace(method, at=at)  # type: ignore[type-var]
            if mine[0].gate is not None:
                return Gated(method, per="constant", gate=term.gate.gate)
        return method

    term_count: dict[int, int] = {}
    for q in make_parts(model, plan, blank=True):
        term_count[q.term] = term_count.get(q.term, 0) + bool(q.acts)
    out = walk(plan)
    assert out is not None
    return out


def narrow(model: nn.Module, sites: list[Site]) -> str:
    """A pattern that matches exactly `sites`: whole roles where they are whole, else roles with their layers."""
    from . import resolve
    from .patterns import select

    everything = [s for s in resolve.sites(model) if s.port == sites[0].port]
    members: list[str] = []
    for role in dict.fromkeys(s.role for s in sites):
        mine = [s for s in sites if s.role == role]
        if role and {s.path for s in select(everything, role, port=mine[0].port)} == {s.path for s in mine}:
            members.append(role)
            continue
        for tower in dict.fromkeys(s.tower for s in mine):
            here = [s for s in mine if s.tower == tower]
            if role and all(s.layer is not None for s in here):
                layers = ",".join(str(x) for x in dict.fromkeys(s.layer for s in here))
                members.append((f"{tower}/" if tower else "") + f"{role}@{{{layers}}}")
            else:
                members += [f"name:{s.path.replace('.', chr(92) + '.')}" for s in here]
    names = [m for m in members if m.startswith("name:")]
    if names:  # a regular expression takes the rest of the pattern, so there can be one, at the end
        members = [m for m in members if not m.startswith("name:")]
        members.append("name:(" + "|".join(m.removeprefix("name:") for m in names) + ")")
    return ",".join(members)
