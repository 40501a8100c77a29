"""`veneer methods`: the registry as a table."""

from __future__ import annotations

NAME = "methods"


def command() -> None:
    """List every method: its family, where it acts, what it can do, and its paper."""
    import sys

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..methods import methods

    table = Table(title="Methods", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head, least in (("method", 14), ("family", 18), ("ports", 6), ("capabilities", 17), ("paper", 10)):
        table.add_column(head, min_width=least)
    for m in methods():
        table.add_row(m.name, m.family, ", ".join(m.ports), ", ".join(m.capabilities), m.paper or "-")
    # a file or a pipe gets a line for each method, whatever the terminal
    Console(width=None if sys.stdout.isatty() else 200).print(table)
