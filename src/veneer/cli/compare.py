"""`veneer compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "compare"


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="The folders of two runs or more, finished or not.")],
    over: Annotated[str | None, typer.Option(metavar="KEY", help="One row for runs that differ in this key alone, as seed: mean ± deviation.")] = None,
    page: Annotated[str, typer.Option(help="The page to write.")] = "compare.html",
) -> None:
    """Show the scores, parameters, time and settings of RUNS in a table, and their curves in a page that opens offline."""
    from rich.console import Console

    from ..report import compare

    found = compare.read_runs(runs)
    console = Console()
    if over is None:
        console.print(compare.terminal(found))
    else:
        from ..report.over import over as averaged

        console.print(compare.drawn(*averaged(found, over)))
    console.print(f"The curves: {compare.page(found).write(Path(page))}", markup=False, soft_wrap=True)
