"""The command line: `veneer VERB …`, one file a verb. `veneer --help` imports no torch."""

from __future__ import annotations

import sys

import typer

from ..errors import VeneerError
from . import chat, compare, convert, demo, doctor, eval, export, init, inspect, merge, methods, predict, preview, prompts, report, schema, select, serve, train

GROUPS = {
    "Set up": (init, doctor, schema),
    "Look": (inspect, methods, demo),
    "Train": (preview, train, prompts, select, report, compare),
    "Use": (predict, chat, eval, serve, merge, export, convert),
}

app = typer.Typer(
    name="veneer",
    help="Parameter-efficient fine-tuning: every family as one idea, gated, settled, merged.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group, verbs in GROUPS.items():
    for verb in verbs:
        app.command(verb.NAME, rich_help_panel=group)(verb.command)


def main() -> None:
    """The entry point: an error that a user can mend is one line and exit code 2, Ctrl-C is 130."""
    try:
        app()
    except VeneerError as e:
        print(f"veneer: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nveneer: stopped. The last checkpoint is kept; the same command goes on from it.", file=sys.stderr)
        sys.exit(130)
