"""What each of two processes does in test_together.py: runs of one configuration, disturbed in several ways."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, TrainerCallback

from veneer.train.config import make_config
from veneer.train.run import run
from veneer.train.together import rank

settings, root = json.loads(sys.argv[1]), Path(sys.argv[2])
wrote: list[str] = []


def note(event: str, args: Any) -> None:
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(root / "whole")):
        wrote.append(str(args[0]))


class Slow(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import time

        time.sleep(0.3)


class Press(TrainerCallback):
    """Ctrl-C, of which one process hears first."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)


def crowded(most: int, training: bool) -> None:
    """From here on the second process has room for `most` rows only, in training or in evaluation."""
    own = BertForSequenceClassification.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank() == 1 and self.training == training and kwargs["input_ids"].shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, *args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    BertForSequenceClassification.forward = forward


def trained(name: str, *callbacks: TrainerCallback, **changes: Any) -> dict[str, float]:
    return run(make_config(settings | {"output": str(root / name)} | changes), quiet=True, callbacks=list(callbacks)).metrics


if sys.argv[3] == "killed":
    trained("killed", Slow())
else:
    trained("killed")
    sys.addaudithook(note)
    said: dict[str, Any] = {"whole": trained("whole"), "wrote": wrote}
    try:
        trained("pressed", Press())
    except KeyboardInterrupt:
        said["checkpoints"] = sorted(p.name for p in (root / "pressed" / "checkpoints").iterdir())
    said["pressed"] = trained("pressed")
    crowded(1, training=False)
    said["evaluated"] = trained("evaluated")
    crowded(3, training=True)
    trained("crowded")
    print(json.dumps(said))
torch.distributed.destroy_process_group()
