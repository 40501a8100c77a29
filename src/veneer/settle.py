"""Settling: learnt gates become constants, small parts are dropped, and what is left is an ordinary static adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import Record
from .attach import state_of
from .build import make_parts
from .compose.gate import Gate
from .errors import CapabilityError, PlanError
from .gates import gates
from .install import install, uninstall
from .plan import Gated, Plan, finite, short
from .sites import Site


@dataclass
class SettleReport:
    """What settling did.

    plan    the static plan that is attached now
    parts   dicts, one for each group of parts: method, module (role), layers, mean, std, parameters, kept, and `loss`, the
            loss of score from removing the group (None where no `score` was given)
    before, after   trainable parameters
    """

    plan: Plan
    parts: list[dict[str, Any]]
    before: int
    after: int
    name: str

    def __str__(self) -> str:
        lines = [f"{'method':<14}{'module':<12}{'gate':>14}{'parameters':>12}  {'loss if removed':>16}  kept"]
        for p in self.parts:
            loss = "-" if p["loss"] is None else f"{p['loss']:+.4f}"
            lines.append(
                f"{p['method']:<14}{p['module']:<12}{p['mean']:>8.3f}±{p['std']:.3f}{p['parameters']:>12,}  {loss:>16}  {'yes' if p['kept'] else 'no'}"
            )
        lines.append(f"{self.before:,} -> {self.after:,} trainable parameters")
        return "\n".join(lines)

    __repr__ = __str__


def settle(
    model: nn.Module,
    batches: Iterable[Any],
    keep: int | float | None = None,
    name: str | None = None,
    *,
    threshold: float = 0.0,
    score: Callable[[nn.Module], float] | None = None,
    retune: Callable[[nn.Module], None] | None = None,
) -> SettleReport:
    """Turn the gated adapter `name` into the smaller static one that its gates point to, in place.

    The gates are measured on `batches`; each becomes its mean there. Groups of parts (one method in one role, as LoRA at
    attn.q, over all layers) are ranked by mean gate, or, where `score` is given, by the measured loss of score from
    removing them; those outside `keep` or under `threshold` are dropped. Constants are folded into the parameters
    (LoRA's B, a bottleneck's W_up, (IA)3's l - 1, a bias' delta); a prefix keeps a constant gate. Ungated parts, such as
    a head, stay. The result merges wherever its methods do.

    keep       an int: that many groups; a float in (0, 1): groups, best first, up to that share of the gated parameters
    threshold  drop groups whose mean gate is under it (0: none)
    score      model -> float, higher is better, on held-out data; runs once for each group, and once for the whole
    retune     model -> None: a brief training of what is left

    Raises: CapabilityError (no gates, or batches that do not reach all of them), PlanError (a `keep` that leaves nothing, a
    score that is no number), AdapterError (merged, or unknown). After an error, also of `score` or `retune`, the adapter
    is as before.
    """
    _check(keep, threshold)
    batches = list(batches)
    state = state_of(model)
    report = gates(model, batches, name=name)
    name = report.adapter
    record: Record = state.adapters[name]
    gated = [p for p in record.parts if p.gate is not None]
    for term in record.plan.terms():
        if term.gate is not None and not term.gate.settles:
            raise CapabilityError(
                f"{term.method.name} is weighed by attention (vn.fuse), which no constant can stand for", fix="Use vn.gated or vn.mixture to settle"
            )
    means = {id(p): row for p, row in zip(gated, report.rows, strict=True)}
    for row in report.rows:
        if not math.isfinite(row["mean"]):
            what = "no batch reaches this part" if not row["n"] else "the gate is not a number"
            raise CapabilityError(f"{row['method']}: {what}", where=row["path"], fix="Give batches as in training, from an adapter that is whole")
    groups: dict[tuple[str, str], list[Any]] = {}
    for p in gated:
        groups.setdefault((p.method_name, p.site.role), []).append(p)
    losses = dict.fromkeys(groups) if score is None else _losses(model, state, record, groups, score)
    rows: list[dict[str, Any]] = []
    for (method, role), parts in groups.items():
        own = [means[id(p)] for p in parts]
        rows.append(
            {
                "method": method, "module": role, "layers": [p.site.layer for p in parts],
                "mean": sum(r["mean"] for r in own) / len(own), "std": sum(r["std"] for r in own) / len(own),
                "parameters": sum(q.numel() for p in parts for k, q in p.named_parameters() if not k.startswith("gate.")),
                "loss": losses[method, role], "kept": True,
            }
        )  # fmt: skip
    _choose(rows, keep, threshold)
    kept = {(r["method"], r["module"]) for r in rows if r["kept"]}
    stay = [p for p in record.parts if p.gate is None or (p.method_name, p.site.role) in kept]
    stay = [p for p in stay if p.acts or any(q.bank is p for q in stay)]  # a bank goes with the last part that uses it
    before = sum(q.numel() for p in record.parts for q in p.parameters())
    undo = _remember(model, state, record)
    try:
        _rebuild(model, state, record, stay, means)
        if retune is not None:
            retune(model)
    except BaseException:
        undo()
        raise
    after = sum(q.numel() for p in record.parts for q in p.parameters())
    return SettleReport(record.plan, rows, before, after, name)


def _check(keep: Any, threshold: Any) -> None:
    number = keep is None or (finite(keep) and keep > 0 and (isinstance(keep, int) or keep <= 1))
    if not number:
        raise PlanError(f"keep={short(keep)}", fix="Give a number of groups, as 2, or a share of the parameters, as 0.5")
    if not finite(threshold):
        raise PlanError(f"threshold={short(threshold)}", fix="Give a number from 0 to 1")


def _choose(rows: list[dict[str, Any]], keep: int | float | None, threshold: float) -> None:
    """Mark the rows that are kept. Raises: PlanError where none would be."""
    ranked = sorted(rows, key=lambda r: (r["loss"] if r["loss"] is not None else r["mean"], r["mean"]), reverse=True)
    room = sum(r["parameters"] for r in rows) * keep if isinstance(keep, float) else None
    used = 0
    for i, r in enumerate(ranked):
        r["kept"] = r["mean"] >= threshold
        if isinstance(keep, int):
            r["kept"] = r["kept"] and i < keep
        elif room is not None:
            r["kept"] = r["kept"] and used + r["parameters"] <= room
            used += r["parameters"] if r["kept"] else 0
    if not any(r["kept"] for r in rows):
        best = f"the largest mean gate is {max(r['mean'] for r in rows):.3f}"
        least = f"the smallest group is {min(r['parameters'] for r in rows) / sum(r['parameters'] for r in rows):.3f} of the gated parameters"
        raise PlanError("nothing would be left", fix=f"Keep at least one group: {best}, {least}")


def _losses(model: nn.Module, state: Any, record: Record, groups: dict[Any, list[Any]], score: Callable[[nn.Module], float]) -> dict[Any, float]:
    """What removing each group takes from the score, with this adapter in use."""
    active = state.active
    try:
        if record.name not in active:
            state.active = (record.name,)
            state.refresh()
        whole = float(score(model))
        out = {key: whole - float(_without(model, state, record, parts, score)) for key, parts in groups.items()}
    finally:
        if state.active != active:
            state.active = active
            state.refresh()
    for key, loss in out.items():
        if not math.isfinite(loss):
            raise PlanError(f"the score without {' at '.join(key)} is not a finite number", fix="Let score return a number, higher for better")
    return out


def _remember(model: nn.Module, state: Any, record: Record) -> Callable[[], None]:
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


def _without(model: nn.Module, state: Any, record: Record, parts: list[Any], score: Callable[[nn.Module], float]) -> float:
    """The score with `parts` switched off."""
    names = [p.adapter for p in parts]
    for p in parts:
        p.adapter = ""
    state.refresh()
    try:
        return score(model)
    finally:
        for p, n in zip(parts, names, strict=True):
            p.adapter = n
        state.refresh()


def _rebuild(model: nn.Module, state: Any, record: Record, stay: list[Any], means: dict[int, Any]) -> None:
    """Fold the gates of the parts that stay, and give the record the static plan that describes them."""
    uninstall(model, state, record)
    for p in stay:
        if p.gate is not None:
            mean, old = means[id(p)]["mean"], p.gate
            p.gate = None if p.scale_by(mean) else _constant(old, mean)
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
    install(model, state, record)
    state.refresh()


def _constant(gate: Gate, mean: float) -> Gate:
    mean = min(max(mean, 1e-6), 1 - 1e-6)
    new = {"device": gate.bias.device, "dtype": gate.bias.dtype}
    bias = float(torch.logit(torch.tensor(mean, dtype=torch.float64)))
    return Gate(gate.width, per="constant", bias=bias, temperature=1.0, causal=False, new=new)


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
