"""What ends a run early and loses nothing: a loss that is no number or leaps, and Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from .together import processes, some
from .trainer import fill_with, tensors_in

SETTLED = 5  # logged losses before a leap can be told from a start


class Guard(TrainerCallback):
    """Stops where the logged loss is not finite, or more than `spike` times the highest logged before, and keeps the last
    adapter that was trained on from without harm: a logged loss says nothing yet of the step that it led to, so the state of a
    log counts as good when the next one is (on the CPU; adapters are small).

    spike  None: only what is not finite stops it

    `reason` then says what happened, and `restore` brings the kept state back.
    """

    def __init__(self, name: str, spike: float | None) -> None:
        self.name, self.spike = name, spike
        self.losses: list[float] = []
        self.good: dict[str, torch.Tensor] | None = None
        self.latest: dict[str, torch.Tensor] | None = None
        self.reason = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # a run that goes on begins with what its checkpoint holds
        self.losses = [entry["loss"] for entry in state.log_history if math.isfinite(entry.get("loss", math.nan))]
        if self.losses:
            self.good = self.latest = self.now(model)

    def now(self, model: Any) -> dict[str, torch.Tensor] | None:
        """A copy of the adapter, or None where its numbers are not finite."""
        found = {k: v.detach().cpu().clone() for k, v in tensors_in(model, self.name).items()}
        return found if all(bool(torch.isfinite(v).all()) for v in found.values() if v.is_floating_point()) else None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or self.reason:
            return
        highest = max((abs(v) for v in self.losses), default=math.inf)
        if not math.isfinite(loss):
            self.reason = f"the loss is {loss} at step {state.global_step}"
        elif self.spike is not None and len(self.losses) >= SETTLED and abs(loss) > self.spike * highest:
            self.reason = f"the loss leaps to {loss:.4g} at step {state.global_step}, {self.spike:g} times its highest before ({highest:.4g})"
        else:
            now = self.now(model)
            if now is not None:
                self.losses.append(loss)
                self.good, self.latest = self.latest, now
                return
            self.reason = f"the adapter's numbers are not finite after step {state.global_step}"
        control.should_training_stop = True
        control.should_save = False

    def restore(self, model: Any) -> None:
        """Put the last good state back. Where there is none the adapter stays as it is."""
        if self.good is not None:
            fill_with(model, self.name, self.good, "the last good state")


class Interrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) lets the step end, saves a checkpoint and stops; the second stops at once.

    Of several processes all stop after the same step, whichever was told first. Their launcher passes a Ctrl-C on that each has
    had already, and kills them after a while, so a second one means nothing there.
    """

    def __init__(self) -> None:
        self.hit = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hit = some(self.hit, args.device)
        if self.hit:
            control.should_save = control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread is told of signals
            return

        def once(number: int, frame: Any) -> None:
            if self.hit and processes() == 1:
                raise KeyboardInterrupt
            self.hit = True

        before = {s: signal.signal(s, once) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
