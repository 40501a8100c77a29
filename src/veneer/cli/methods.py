"""`veneer methods`: the registry as a table."""

from __future__ import annotations

NAME = "methods"


def command() -> None:
    """List every method: its family, where it acts, what it can do, and its paper."""
    from rich.console import Console
    from rich.table import Table

    from ..methods import methods

    table = Table(title="Methods")
    for head in ("method", "family", "ports", "capabilities", "paper"):
        table.add_column(head)
    for m in methods():
        table.add_row(m.name, m.family, ", ".join(m.ports), ", ".join(m.capabilities), m.paper or "-")
    Console().print(table)
