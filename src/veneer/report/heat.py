"""The gates as a heat map, layers down and methods across: for the terminal, and as a page of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import charts
from .page import Page

SHADES = " ░▒▓█"


def grid(rows: list[dict[str, Any]]) -> tuple[list[str], list[str], list[list[float | None]], list[list[float | None]]]:
    """(layers, columns, mean, spread) from the rows of a GateReport; a cell is the mean over its gates, None where there
    is no gate or no example reached it."""
    rows = [r for r in rows if math.isfinite(r["mean"])]
    columns = list(dict.fromkeys(f"{r['method']} {r['module']}" for r in rows))
    layers = list(dict.fromkeys((r["tower"], r["layer"]) for r in sorted(rows, key=lambda r: (r["tower"], -1 if r["layer"] is None else r["layer"]))))
    towers = {t for t, _ in layers}
    mean: list[list[float | None]] = []
    spread: list[list[float | None]] = []
    for tower, layer in layers:
        cells = [[r for r in rows if (r["tower"], r["layer"]) == (tower, layer) and f"{r['method']} {r['module']}" == c] for c in columns]
        mean.append([sum(r["mean"] for r in c) / len(c) if c else None for c in cells])
        spread.append([max(r["std"] for r in c) if c else None for c in cells])
    names = [f"{t + ' ' if len(towers) > 1 else ''}{'-' if n is None else n}" for t, n in layers]
    return names, columns, mean, spread


def terminal(rows: list[dict[str, Any]]) -> Any:
    """A rich table with a shaded cell for each gate."""
    from rich.table import Table
    from rich.text import Text

    layers, columns, mean, spread = grid(rows)
    table = Table(title="Mean gate by layer and method (± spread over examples)")
    table.add_column("layer", justify="right")
    for c in columns:
        table.add_column(c, justify="right")
    for name, ms, ss in zip(layers, mean, spread, strict=True):
        cells = []
        for m, s in zip(ms, ss, strict=True):
            if m is None or s is None:
                cells.append(Text("-"))
                continue
            cells.append(
                Text(f"{SHADES[min(4, int(m * 5))] * 2} {m:.3f}±{s:.3f}", style=f"rgb({int(40 + 200 * (1 - m))},{int(60 + 120 * m)},{int(90 + 160 * m)})")
            )
        table.add_row(name, *cells)
    return table


def add(page: Page, rows: list[dict[str, Any]], title: str = "Gates") -> None:
    """A section of `page` with the heat map and the mean of each method."""
    page.section(title, "How much of each method the model lets through: the mean over examples of its gate (0 to 1), ± their standard deviation.")
    layers, columns, mean, spread = grid(rows)
    page.figure(charts.heat(layers, columns, mean, spread), "Mean gate by layer and method", wide=True)


def page(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    """Write the heat map to `path` as one self-contained HTML file."""
    new = Page(title)
    add(new, rows)
    return new.write(path)
