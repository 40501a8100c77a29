"""`veneer serve`: runs behind HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "serve"


def command(
    runs: Annotated[list[str], typer.Argument(help="Runs or adapters on one base, as FOLDER or FOLDER=NAME.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.", min=0, max=65535)] = 8000,
    batch: Annotated[int, typer.Option(help="Requests that are answered together.", min=1)] = 16,
    wait: Annotated[float, typer.Option(help="Seconds for which a request waits for others.", min=0)] = 0.01,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load it all and say what would be served where; do not listen.")] = False,
) -> None:
    """Serve RUNS on one base, in the form of OpenAI's interface: `model` in a request names the adapter.

    Requests for different adapters share a batch, each row with its own adapter. There is no authentication: keep the default
    address, or put a proxy before it.
    """
    from ..errors import ConfigError

    try:
        import uvicorn

        from ..serve.http import create_app
    except ImportError as e:
        raise ConfigError(f"the package {e.name!r} is not installed", where="veneer serve", fix='pip install "veneer[serve]"') from e
    from ..serve.opened import open_folder

    first, *more = runs
    folder, _, name = first.partition("=")
    opened = open_folder(folder, model=model, name=name or None, more=more)
    app = create_app(opened, batch, wait)
    typer.echo(f"{'would serve ' if dry_run else ''}{opened.base} with {', '.join(opened.names)} at http://{host}:{port}")
    if dry_run:
        return
    uvicorn.run(app, host=host, port=port, log_level="warning")
