"""The command line: `veneer VERB …`, one file a verb. `veneer --help` imports no torch."""

from __future__ import annotations

import logging
import sys
import warnings

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
    # transformers imports them wherever they are installed, and they miss kernels that nothing here needs, at length
    for noisy in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # for those who write code, not for those who run it
    try:
        app()
    except VeneerError as e:
        print(f"veneer: {e}", file=sys.stderr)
        sys.exit(2)
    except PermissionError as e:  # of any look at a file, wherever it lies
        print(f"veneer: {e.strerror or e} [{e.filename}]. Give a place that you may read and write, or the right to it", file=sys.stderr)
        sys.exit(2)
    finally:
        group = sys.modules.get("torch.distributed")
        if group is not None and group.is_available() and group.is_initialized():
            group.destroy_process_group()
