"""Reading the gates: how much of each method the model uses, by layer and module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import known
from .attach import state_of
from .calls import call, evaluating
from .errors import AdapterError, CapabilityError


@dataclass
class GateReport:
    """One row for each gated part: method, layer, module (its role), tower, path, mean, std and n over examples."""

    rows: list[dict[str, Any]]
    adapter: str

    def by_method(self) -> dict[str, float]:
        """The mean gate of each method."""
        out: dict[str, list[float]] = {}
        for r in self.rows:
            out.setdefault(r["method"], []).append(r["mean"])
        return {m: sum(v) / len(v) for m, v in out.items()}

    def __str__(self) -> str:
        columns = list(dict.fromkeys((r["method"], r["module"]) for r in self.rows))
        layers = sorted({(r["tower"], -1 if r["layer"] is None else r["layer"]) for r in self.rows})
        cells: dict[Any, list[tuple[float, float]]] = {}
        for r in self.rows:
            key = (r["tower"], -1 if r["layer"] is None else r["layer"], r["method"], r["module"])
            cells.setdefault(key, []).append((r["mean"], r["std"]))
        heads = [f"{m} {role}" for m, role in columns]
        width = [max(len(h), 11) for h in heads]
        lines = ["layer".ljust(12) + "  ".join(h.rjust(w) for h, w in zip(heads, width, strict=True))]
        for tower, layer in layers:
            row = []
            for (m, role), w in zip(columns, width, strict=True):
                found = cells.get((tower, layer, m, role))
                row.append((f"{sum(a for a, _ in found) / len(found):.3f}±{max(b for _, b in found):.3f}" if found else "-").rjust(w))
            lines.append(f"{tower} {layer if layer >= 0 else '-'}".ljust(12) + "  ".join(row))
        return "\n".join(lines)

    __repr__ = __str__


def gates(model: nn.Module, batches: Iterable[Any], name: str | None = None) -> GateReport:
    """The mean gate of every method, layer and module over `batches`, with its spread over examples.

    batches  dicts of model inputs (or tuples of positional ones); the model is run on each without gradients, in
             evaluation mode, and left in the mode that it was in
    name     the adapter; default: the active one that has gates

    Padding does not count, and each example's gate is the same whatever else is in its batch. A constant gate is counted
    once a call. Where no batch reaches a part its mean is NaN and its n is 0.

    Raises: AdapterError for an unknown name or while adapters are merged; CapabilityError where the plan has no gates or
    `batches` is empty.
    """
    state = state_of(model)
    if state.merged is not None:
        raise AdapterError("adapters are merged into this model", fix="vn.unmerge(model) first")
    names = [known(state, name)] if name is not None else [n for n in state.active if any(p.gate for p in state.adapters[n].parts)]
    if not names:
        raise CapabilityError("no active adapter has gates", fix="Attach a gated plan: vn.attach(model, vn.gated(...), name='mine')")
    parts = [p for p in state.adapters[names[0]].parts if p.gate is not None]
    if not parts:
        raise CapabilityError(f"{names[0]!r} has no gates", fix="Attach a gated plan: vn.gated(...)")
    seen: dict[int, list[Tensor]] = {id(p): [] for p in parts}
    count = 0
    active, enabled, state.enabled = state.active, state.enabled, True
    try:
        if names[0] not in active:
            state.active = (names[0],)
            state.refresh()
        for p in parts:
            p.gate.watch = seen[id(p)].append
        with evaluating(model), torch.no_grad():
            for batch in batches:
                count += 1
                call(model, batch)
    finally:
        for p in parts:
            p.gate.watch = None
        state.enabled = enabled
        if state.active != active:
            state.active = active
            state.refresh()
    if not count:
        raise CapabilityError("there are no batches to measure the gates on")
    rows = []
    for p in parts:
        values = torch.cat([v.float().reshape(-1).cpu() for v in seen[id(p)]]) if seen[id(p)] else torch.empty(0)
        rows.append(
            {
                "method": label(p), "layer": p.site.layer, "module": p.site.role, "tower": p.site.tower, "path": p.site.path,
                "mean": float(values.mean()) if len(values) else float("nan"),
                "std": float(values.std(unbiased=False)) if len(values) else float("nan"), "n": len(values),
            }
        )  # fmt: skip
    return GateReport(rows, names[0])


def label(part: Any) -> str:
    """The part's method, and which member of a mixture or fusion it is."""
    return part.method_name if part.gate.member is None else f"{part.method_name}#{part.gate.member + 1}"
