"""`veneer train`: a run from a configuration."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "train"


def command(
    config: Annotated[str, typer.Argument(help="A YAML configuration; examples/ has some.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, as learning_rate=1e-3 or data.limit=500.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load, attach and show what would be trained; write nothing.")] = False,
) -> None:
    """Train the plan of CONFIG on its data. The same command goes on from the last checkpoint."""
    from rich.console import Console

    from ..train.config import load_config

    settings = load_config(config, overrides)
    console = Console()
    if dry_run:
        from ..train.preview import preview
        from ..train.run import allowed
        from .preview import show

        allowed(settings)
        show(preview(settings, rows=0), console)
        return
    from ..train.run import run
    from ..train.together import rank

    try:
        result = run(settings)
    except KeyboardInterrupt:
        from pathlib import Path

        from ..train.folder import CHECKPOINTS
        from ..train.trainer import last_checkpoint

        last = last_checkpoint(Path(settings.output) / CHECKPOINTS) if settings.resume else None
        how = f"{last} is kept, and the same command goes on from it" if last else "there is no checkpoint yet, and the same command begins anew"
        if rank() == 0:
            typer.echo(f"\nveneer: stopped; {how}", err=True)
        raise typer.Exit(130) from None
    console.quiet = rank() != 0
    found = ", ".join(f"{k} {v:.4f}" for k, v in result.metrics.items())
    console.print(f"{found}; {result.trainable:,} trainable parameters ({100 * result.share:.3f}% of the base) in {result.seconds:.0f} s", markup=False)
    console.print(f'veneer predict {result.output} "…"', markup=False, soft_wrap=True)
    if result.stopped:
        typer.echo(f"veneer: stopped early: {result.stopped}. The last good state is kept. Try a smaller learning_rate, or look at the data", err=True)
        raise typer.Exit(1)
