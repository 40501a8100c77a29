"""`veneer compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "compare"


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="The folders of two runs or more, finished or not.")],
    page: Annotated[str, typer.Option(help="The page to write.")] = "compare.html",
) -> None:
    """Show the scores, parameters, time and settings of RUNS in a table, and their curves in a page that opens offline."""
    from rich.console import Console

    from ..report import compare

    found = compare.read_runs(runs)
    console = Console()
    console.print(compare.terminal(found))
    console.print(f"The curves: {compare.page(found).write(Path(page))}", markup=False, soft_wrap=True)
