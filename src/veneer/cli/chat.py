"""`veneer chat`: talk to a run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

NAME = "chat"


def command(
    run: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, Hugging Face PEFT's or AdapterHub's.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[MORE]…", help="Further ones on the same base, as FOLDER or FOLDER=NAME, to switch between.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message that opens every conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; higher draws more freely.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
) -> None:
    """Talk to the model of RUN; answers appear as they are made. `/help` lists what else a line can be.

    Reads lines from standard input, so a pipe works as well as a terminal.
    """
    from ..serve.chat import Chat, Sampling
    from ..serve.opened import open_folder

    chat = Chat(open_folder(run, model=model, more=more), Sampling(max_new_tokens, temperature, seed), system=system)
    terminal = sys.stdin.isatty()
    typer.echo(chat.greeting())
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
            if not terminal and not line:
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo("")
            return
        try:
            for piece in chat.line(line):
                typer.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            chat.stop()
            typer.echo("\n(stopped)", nl=False)
        typer.echo("")
        if chat.over:
            return
