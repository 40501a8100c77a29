"""`veneer convert`: an adapter from one file format to the other."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "convert"


def command(
    source: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, or Hugging Face PEFT's.")],
    to: Annotated[str, typer.Argument(help="The folder to write, new or empty.")],
    model: Annotated[str | None, typer.Option(help="The base, where the adapter names none or it lies elsewhere now.")] = None,
    format: Annotated[str | None, typer.Option(help="'veneer' or 'peft'; default: the one that SOURCE is not.")] = None,
) -> None:
    """Write the adapter SOURCE as TO in the other format (native <-> PEFT), and compare the two on the base."""
    from ..serve.convert import convert

    done = convert(source, to, model=model, format=format)
    typer.echo(f"{done.format}: {done.path}")
    typer.echo(done.difference)
