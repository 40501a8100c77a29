"""What is attached, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attach import state_of
from .install import KEY


@dataclass
class Summary:
    """Trainable parameters by adapter, method and role; printing it shows the table.

    rows       dicts: adapter, method, role, sites, parameters, share
    trainable  numbers that the active adapters train; total: of the base; share: their quotient
    """

    rows: list[dict[str, Any]]
    trainable: int
    total: int
    active: tuple[str, ...]
    merged: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def _mark(self, name: str) -> str:
        return "" if name in self.active else " (merged)" if name in self.merged else " (off)"

    def __str__(self) -> str:
        head = ("adapter", "method", "role", "sites", "parameters", "share of base")
        body = [
            (r["adapter"] + self._mark(r["adapter"]), r["method"], r["role"] or "-", str(r["sites"]),
             f"{r['parameters']:,}", f"{100 * r['share']:.4f}%")
            for r in self.rows
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in (head, *body)]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(f"trainable {self.trainable:,} of {self.total:,} ({100 * self.share:.4f}%), active: {', '.join(self.active) or 'none'}")
        return "\n".join(lines)

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """The attached adapters: sites, trainable parameters and their share of the base's, for each method and role; a
    plan's gates have rows of their own. Works on the meta device, so a plan can be measured before a model is loaded.

    Raises: AdapterError where nothing is attached.
    """
    state = state_of(model)
    merged = {id(m._parameters[t]) for m, t in state.merged.added} if state.merged is not None else set()
    base = {id(p): numbers(m, t, p) for path, m in model.named_modules() if KEY not in path.split(".") for t, p in m.named_parameters(recurse=False)}
    total = sum(count for key, count in base.items() if key not in merged)
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    trainable = 0
    for name, record in state.adapters.items():
        table: dict[tuple[str, str], list[int]] = {}
        for part in record.parts:
            for gate in (False, True):
                here = [(k, p) for k, p in part.named_parameters() if k.startswith("gate.") == gate]
                if not here:
                    continue
                entry = table.setdefault((part.method_name + (" gate" if gate else ""), part.site.role), [0, 0])
                entry[0] += 1
                for _, p in here:
                    if id(p) not in seen:
                        seen.add(id(p))
                        entry[1] += p.numel()
                        trainable += p.numel() if name in state.active and p.requires_grad else 0
        for (method, role), (sites, count) in table.items():
            rows.append({"adapter": name, "method": method, "role": role, "sites": sites, "parameters": count, "share": count / total if total else 0.0})
    return Summary(rows, trainable, total, state.active, state.merged.names if state.merged is not None else ())


def numbers(module: nn.Module, name: str, p: Tensor) -> int:
    """How many numbers the parameter `name` stands for: of a matrix whose quantiser packs several into one, all of them."""
    if name != "weight" or p.is_floating_point():
        return p.numel()
    return max(p.numel(), getattr(module, "in_features", 0) * getattr(module, "out_features", 0))
