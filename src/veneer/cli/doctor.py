"""`veneer doctor`: is everything here that is needed, and if not, what mends it."""

from __future__ import annotations

import typer

NAME = "doctor"


def command() -> None:
    """Check versions, devices, optional parts and the disk, and train one step; name the fix for what is wrong.

    The exit code is 1 where something is wrong, and 0 where parts that nobody asked for are merely absent.
    """
    from rich.console import Console
    from rich.table import Table

    from ..doctor import examine

    console = Console()
    found = examine()
    table = Table(box=None, show_header=False, pad_edge=False)
    for f in found:
        table.add_row({"good": "[green]ok[/]", "absent": "[dim]--[/]", "wrong": "[red]!![/]"}[f.state], f.what, f.says)
    console.print(table)
    wrong = [f for f in found if f.state == "wrong"]
    for f in wrong:
        console.print(f"{f.what}: {f.says}. {f.fix}", markup=False, soft_wrap=True)
    absent = [f for f in found if f.state == "absent"]
    if absent:
        console.print("To have what is absent:", markup=False)
        for f in absent:
            console.print(f"  {f.fix}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if wrong else 0)
