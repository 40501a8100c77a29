"""A selection in the terminal: as plain text, and as a rich table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Selection, Trial

HEADS = ("", "trial", "plan", "score", "±", "parameters", "share", "latency", "memory", "training", "PSCP", "status")


def rows(selection: Selection, most: int) -> list[tuple[str, ...]]:
    """The cells, best score first: those trained in full, then the rest."""
    front = {t.number for t in selection.front}
    order = sorted(selection.trials, key=lambda t: (t.status != "complete", -t.score if math.isfinite(t.score) else math.inf, t.number))
    kept = order[:most]
    if all(t.number != selection.chosen for t in kept):
        kept = [selection.best, *kept[: most - 1]]
    return [_row(t, ">" if t.number == selection.chosen else "*" if t.number in front else "") for t in kept]


def _row(t: Trial, mark: str) -> tuple[str, ...]:
    o = t.objectives
    return (
        mark, str(t.number), t.label, number(t.score, ".4f"), number(t.noise or math.nan, ".4f"), number(o.get("parameters"), ",.0f"), f"{100 * t.share:.3f}%",
        number(o.get("latency"), ".2f", "x"), size(o.get("memory")), number(o.get("seconds"), ".1f", " s"), number(t.pscp, ".4f"), t.status,
    )  # fmt: skip


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form) + unit


def size(value: float | None) -> str:
    """Bytes in words."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def closing(selection: Selection) -> str:
    """What stands under the table."""
    c = selection.cost
    counted = {}
    for t in selection.trials:
        counted[t.status] = counted.get(t.status, 0) + 1
    tried = ", ".join(f"{n} {s}" for s, n in counted.items())
    return (
        f"recommended: trial {selection.chosen}, {selection.reason}\n{len(selection.trials)} candidates ({tried}); "
        f"{c.get('steps', 0):,.0f} steps in {c.get('seconds', 0):.0f} s; > recommended, * on the front of {', '.join(selection.objectives)}"
    )


def plain(selection: Selection, most: int) -> str:
    body = [HEADS, *rows(selection, most)]
    body = [tuple(c if i != 2 or len(c) <= 70 else c[:69] + "…" for i, c in enumerate(r)) for r in body]
    width = [max(len(r[i]) for r in body) for i in range(len(HEADS))]
    lines = ["  ".join(c.ljust(w) if i in (0, 2, 11) else c.rjust(w) for i, (c, w) in enumerate(zip(r, width, strict=True))).rstrip() for r in body]
    lines.insert(1, "-" * max(map(len, lines)))
    if len(selection.trials) > most:
        lines.append(f"… and {len(selection.trials) - most} more")
    return "\n".join([*lines, closing(selection)])


def rich_table(selection: Selection, most: int = 20) -> Any:
    """The same as a rich table."""
    from rich.table import Table

    table = Table(title=f"Selection on {selection.settings.get('model', 'the model')}: best score first")
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="left" if i in (0, 2, 11) else "right", overflow="fold" if i == 2 else "ellipsis", no_wrap=i not in (2,))
    for r in rows(selection, most):
        table.add_row(*r, style="bold" if r[0] == ">" else "")
    return table
