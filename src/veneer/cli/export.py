"""`veneer export`: a run for other programs."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "export"


def command(
    run: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, or Hugging Face PEFT's.")],
    to: Annotated[str, typer.Option("--to", help="peft, safetensors, gguf (llama.cpp) or onnx.")],
    out: Annotated[str | None, typer.Option(help="The folder to write, new or empty; default: RUN/export/TARGET.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
) -> None:
    """Write the adapter of RUN for another program, open it again with that program's own reader, and compare the outputs."""
    from pathlib import Path

    from ..serve.export import export
    from ..serve.opened import open_folder

    done = export(open_folder(run, model=model, plain=True), out or Path(run) / "export" / to, to)
    typer.echo(f"{done.path}")
    typer.echo(f"read again by {done.reader}: {done.difference}")
