"""`veneer predict`: use a run on a text."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "predict"


def command(
    run: Annotated[str, typer.Argument(help="The folder of a run that `veneer train` or `veneer demo` wrote.")],
    text: Annotated[list[str], typer.Argument(help="One text or more.")],
) -> None:
    """Label TEXT (or continue it) with the adapter of RUN."""
    from ..serve.predict import Predictor

    predictor = Predictor(run)
    for t, found in zip(text, predictor(text), strict=True):
        if isinstance(found, str):
            typer.echo(found)
            continue
        typer.echo(f"{found[0][0]}  ({', '.join(f'{name} {p:.3f}' for name, p in found)})  {t}")
