"""`veneer convert`: an adapter from one file format to another."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "convert"


def command(
    source: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, Hugging Face PEFT's, or AdapterHub's.")],
    to: Annotated[str, typer.Argument(help="The folder to write, new or empty.")],
    model: Annotated[str | None, typer.Option(help="The base, where the adapter names none or it lies elsewhere now.")] = None,
    format: Annotated[str | None, typer.Option(help="'veneer' or 'peft'; default: native, or PEFT's where SOURCE is native.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all aside, compare, and keep nothing.")] = False,
) -> None:
    """Write the adapter SOURCE as TO in another format (PEFT's or AdapterHub's -> native -> PEFT's), and compare the two on the base."""
    from contextlib import nullcontext

    from ..files import rehearsal
    from ..serve.convert import convert

    with rehearsal() if dry_run else nullcontext():
        done = convert(source, to, model=model, format=format)
    typer.echo(f"{'would write ' if dry_run else ''}{done.format}: {done.path}")
    typer.echo(done.difference)
