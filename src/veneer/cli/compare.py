"""`veneer compare`: runs side by side."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

NAME = "compare"


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="The folders of two runs or more, finished or not.")],
    over: Annotated[str | None, typer.Option(metavar="KEY", help="One row for runs that differ in this key alone, as seed: mean ± deviation.")] = None,
    page: Annotated[str, typer.Option(help="The page to write.")] = "compare.html",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the table and draw the page, and keep nothing.")] = False,
) -> None:
    """Show the scores, parameters, time and settings of RUNS in a table, and their curves in a page that opens offline."""
    from rich.console import Console

    from ..files import rehearsal
    from ..report import compare

    found = compare.read_runs(runs)
    console = Console()
    if over is None:
        console.print(compare.terminal(found))
    else:
        from ..report.over import over as averaged

        console.print(compare.drawn(*averaged(found, over)))
    with rehearsal() if dry_run else nullcontext():
        written = compare.page(found).write(Path(page))
    console.print(f"The curves: {'would write ' if dry_run else ''}{written}", markup=False, soft_wrap=True)
