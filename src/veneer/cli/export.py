"""`veneer export`: a run for other programs."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "export"


def command(
    run: Annotated[str, typer.Argument(help="A run's folder, or an adapter's: native, Hugging Face PEFT's or AdapterHub's.")],
    to: Annotated[str, typer.Option("--to", help="peft, vllm, safetensors, gguf (llama.cpp) or onnx.")],
    out: Annotated[str | None, typer.Option(help="The folder to write, new or empty; default: RUN/export/TARGET.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all aside, compare, and keep nothing.")] = False,
) -> None:
    """Write the adapter of RUN for another program, open it again with that program's own reader, and compare the outputs."""
    from contextlib import nullcontext
    from pathlib import Path

    from ..files import rehearsal
    from ..serve.export import export
    from ..serve.opened import open_folder

    with rehearsal() if dry_run else nullcontext():
        done = export(open_folder(run, model=model, plain=True), out or Path(run) / "export" / to, to)
    typer.echo(f"{'would write ' if dry_run else ''}{done.path}")
    typer.echo(f"read again by {done.reader}: {done.difference}")
