"""`veneer merge`: a run as a plain checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "merge"


def command(
    run: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, Hugging Face PEFT's or AdapterHub's.")],
    to: Annotated[str, typer.Argument(help="The folder to write, new or empty.")],
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: that of the base's own checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all aside, compare, and keep nothing.")] = False,
) -> None:
    """Fold the adapter of RUN into its base and write a plain checkpoint, which from_pretrained loads without this library.

    What was written is loaded again and its output compared with the adapter's. Methods that are not linear in the weights,
    and gates that vary with the input, are refused in words: keep those attached, or settle the gates first.
    """
    from contextlib import nullcontext

    from ..files import rehearsal
    from ..serve.merged import write_merged
    from ..serve.opened import open_folder

    with rehearsal() if dry_run else nullcontext():
        done = write_merged(open_folder(run, model=model, plain=True), to, dtype)
    typer.echo(f"{'would write ' if dry_run else ''}{done.path} ({done.dtype})")
    typer.echo(f"{done.difference}")
