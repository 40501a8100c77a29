"""`veneer prompts`: hand-written, learnt and searched prompts, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "prompts"


def command(
    config: Annotated[str, typer.Argument(help="A YAML configuration whose plan has a soft prompt, as plan: prompt.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, as plan=p-tuning or data.limit=500.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A hand-written prompt to compare with; may be given several times.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows that the search measures prompts on.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Exchanges of one token, at most, from each start.", min=1)] = 10,
    tries: Annotated[int, typer.Option(help="Prompts measured for each exchange.", min=1)] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load, attach and show what would be trained; write nothing.")] = False,
) -> None:
    """Score no prompt, hand-written ones, the learnt soft prompt, its nearest tokens, and words found by search."""
    from rich.console import Console
    from rich.table import Table

    from ..train.config import load_config

    settings = load_config(config, overrides)
    from ..train.prompts import TABLE, Compared, compare_prompts, soft_prompt

    console = Console()
    if dry_run:
        from ..train.preview import preview
        from .preview import show

        soft_prompt(settings)
        show(preview(settings, rows=0), console)
        return
    found: list[Compared] = []
    with console.status("The soft prompt is trained…") as status:
        for c in compare_prompts(settings, text or [], rows=rows, steps=steps, tries=tries):
            found.append(c)
            status.update(f"{c.kind} is done…")
    table = Table(box=None)
    metrics = list(found[0].metrics)
    table.add_column("prompt")
    for m in metrics:
        table.add_column(m, justify="right")
    table.add_column("text")
    for c in found:
        table.add_row(c.kind, *(f"{c.metrics[m]:.4f}" if m in c.metrics else "-" for m in metrics), "-" if c.text is None else repr(c.text))
    console.print(table, markup=False)
    console.print(f"{settings.output}/{TABLE}", markup=False)
