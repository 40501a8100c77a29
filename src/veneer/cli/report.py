"""`veneer report`: the page of a run or of a selection, written again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

NAME = "report"


def command(
    folder: Annotated[str, typer.Argument(help="The folder of a run, finished or not, or of a selection.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Draw it all, and keep nothing.")] = False,
) -> None:
    """Write report.html into FOLDER from what stands there: also for a run that goes on, or was cut off."""
    from ..errors import ConfigError
    from ..files import rehearsal
    from ..report import run, selection
    from ..report.compare import near_runs

    place = Path(folder)
    kinds = [
        write
        for write, names in ((run.report, ("run.json",)), (selection.report, tuple(selection.FILES.values())))
        if any((place / n).is_file() for n in names)
    ]
    if not kinds:
        raise ConfigError("this folder holds no run and no selection", where=folder, fix=near_runs(place))
    with rehearsal() if dry_run else nullcontext():
        typer.echo(f"{'would write ' if dry_run else ''}{kinds[0](place)}")
