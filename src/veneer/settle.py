"""Settling: learnt gates become constants, small parts are dropped, and what is left is an ordinary static adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .ablate import added, constant, losses_of
from .adapter import Record
from .attach import state_of
from .build import make_parts
from .errors import CapabilityError, PlanError
from .files import write_whole
from .gates import gates
from .install import install, uninstall
from .keep import Keep, choose
from .plan import Gated, Plan, finite, short
from .sites import Site


@dataclass
class SettleReport:
    """What settling did.

    plan    the static plan that is attached now
    parts   dicts, one for each group of parts: method, module (role), layers, mean and std (over examples) of its gate,
            parameters, merges, kept, and `loss` with `loss_std`: the score lost by removing the group, and the standard error
            of that over the held-out examples (None where no `score` was given, or it was one number)
    before, after   trainable parameters
    latency         what the kept parts that do not merge add to a call, as a share; None where no latency was asked for
    """

    plan: Plan
    parts: list[dict[str, Any]]
    before: int
    after: int
    name: str
    latency: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all. Raises: StoreError."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return Path(path)

    def __str__(self) -> str:
        lines = [f"{'method':<14}{'module':<12}{'gate':>14}{'parameters':>12}  {'loss if removed':>16}  kept"]
        for p in self.parts:
            loss = "-" if p["loss"] is None else f"{p['loss']:+.4f}" + ("" if p["loss_std"] is None else f"±{p['loss_std']:.4f}")
            lines.append(
                f"{p['method']:<14}{p['module']:<12}{p['mean']:>8.3f}±{p['std']:.3f}{p['parameters']:>12,}  {loss:>16}  {'yes' if p['kept'] else 'no'}"
            )
        more = "" if self.latency is None else f", +{100 * self.latency:.1f}% latency"
        lines.append(f"{self.before:,} -> {self.after:,} trainable parameters{more}")
        return "\n".join(lines)

    __repr__ = __str__


def settle(
    model: nn.Module,
    batches: Iterable[Any],
    keep: int | float | str | dict[str, Any] | None = None,
    name: str | None = None,
    *,
    threshold: float = 0.0,
    score: Callable[[nn.Module], float | Sequence[float]] | None = None,
    retune: Callable[[nn.Module], None] | None = None,
) -> SettleReport:
    """Turn the gated adapter `name` into the smaller static one that its gates point to, in place.

    The gates are measured on `batches`; each becomes its mean there. Groups of parts (one method in one role, as LoRA at
    attn.q, over all layers) are ranked by mean gate, or, where `score` is given, by the measured loss of score from
    removing them; those outside `keep` or under `threshold` are dropped. Constants are folded into the parameters
    (LoRA's B, a bottleneck's W_up, (IA)3's l - 1, a bias' delta); a prefix keeps a constant gate. Ungated parts, such as
    a head, stay. The result merges wherever its methods do.

    keep       an int: that many groups; a float in (0, 1]: groups, best first, up to that share of the gated parameters;
               'latency:+5%': best first, while a call on the first batch takes at most 5% more than without them (measured),
               where methods that merge cost nothing, so 'latency:+0%' keeps only those; or a dict of these three
    threshold  drop groups whose mean gate is under it (0: none)
    score      model -> float, higher is better, on held-out data; or one float for each example (or fold) there, and the
               report then gives the spread of the loss too; runs once for each group, and once for the whole
    retune     model -> None: a brief training of what is left

    Raises: CapabilityError (no gates, or batches that do not reach all of them), PlanError (a `keep` that leaves nothing, a
    score that is no number), AdapterError (merged, or unknown). After an error, also of `score` or `retune`, the adapter
    is as before.
    """
    limits = Keep.parse(keep)
    if not finite(threshold):
        raise PlanError(f"threshold={short(threshold)}", fix="Give a number from 0 to 1")
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
    losses: dict[Any, tuple[float | None, float | None]] = (
        dict.fromkeys(groups, (None, None)) if score is None else losses_of(model, state, record, groups, score)
    )
    rows: list[dict[str, Any]] = []
    terms = list(record.plan.terms())
    for (method, role), parts in groups.items():
        own = [means[id(p)] for p in parts]
        rows.append(
            {
                "method": method, "module": role, "layers": [p.site.layer for p in parts],
                "mean": sum(r["mean"] for r in own) / len(own), "std": sum(r["std"] for r in own) / len(own),
                "parameters": sum(q.numel() for p in parts for k, q in p.named_parameters() if not k.startswith("gate.")),
                "loss": losses[method, role][0], "loss_std": losses[method, role][1],
                "merges": all(terms[p.term].method.mergeable for p in parts), "kept": True,
            }
        )  # fmt: skip
    members = list(groups.values())

    def measure(numbers: list[int]) -> float:
        return added(model, state, record, [p for i in numbers for p in members[i]], means, batches[0])

    latency = choose(rows, limits, threshold, measure)
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
    return SettleReport(record.plan, rows, before, after, name, latency)


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


def _rebuild(model: nn.Module, state: Any, record: Record, stay: list[Any], means: dict[int, Any]) -> None:
    """Fold the gates of the parts that stay, and give the record the static plan that describes them."""
    uninstall(model, state, record)
    for p in stay:
        if p.gate is not None:
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
    install(model, state, record)
    state.refresh()


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
