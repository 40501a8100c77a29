"""Trackers: where else a run's log goes, through TrainingArguments' `report_to`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError, did_you_mean


def trackers(names: list[str]) -> list[str] | str:
    """What TrainingArguments takes as `report_to` for the trackers `names` (tensorboard, wandb, mlflow, trackio, …).

    Raises: ConfigError for one that transformers does not know, or whose package is missing; before a run has begun.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"there is no tracker {name!r}", where="report_to", fix=did_you_mean(name, INTEGRATION_TO_CALLBACK))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as e:
            raise ConfigError(f"{name} is not ready: {str(e).splitlines()[0]}", where="report_to", fix=f"pip install {name.replace('_', '-')}") from None
    return names or "none"


class Deferred:
    """A tracker's callback that hears of the training's end only when `close` is called."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        self.last: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tracker, name)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.last = (args, kwargs)

    def close(self) -> None:
        if self.last is not None:
            self.tracker.on_train_end(*self.last[0], **self.last[1])
            self.last = None


@contextmanager
def until_evaluated() -> Iterator[Callable[[Any], None]]:
    """Gives a function that keeps a trainer's trackers open until the block ends.

    Trainer closes them when training ends, and the run's last evaluation would open them again: TensorBoard's in a file that
    takes the place of the first where both begin in one second, and that nobody closes.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, opened = tuple(INTEGRATION_TO_CALLBACK.values()), []

    def defer(trainer: Any) -> None:
        callbacks = trainer.callback_handler.callbacks
        for i, c in enumerate(callbacks):
            if isinstance(c, known):
                callbacks[i] = Deferred(c)
                opened.append(callbacks[i])

    try:
        yield defer
    finally:
        for c in opened:
            c.close()
