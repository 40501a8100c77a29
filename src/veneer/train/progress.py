"""Progress while training: steps, loss, tokens a second, memory, time left."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

WINDOW = 20  # steps over which speed is taken: long enough to be calm, short enough to follow


class Progress(TrainerCallback):
    """A line that moves on a terminal; elsewhere, as in a log file, one line for each entry of the log.

    Speed is in tokens without padding (Trainer's `num_input_tokens_seen`) where the model reads tokens, in examples
    otherwise. Memory is the most that torch has held on the GPU, or what this process holds now.

        with Progress() as bar:
            Trainer(..., callbacks=[bar]).train()

    quiet  show nothing; console: a rich console, default one on standard error
    """

    def __init__(self, *, quiet: bool = False, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.quiet, self.console = quiet, console or Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True), TextColumn("left"),
            console=self.console, disable=quiet or not self.console.is_terminal, speed_estimate_period=120,
        )  # fmt: skip
        self.training: Any = None
        self.testing: Any = None
        self.loss: float | None = None
        self.times: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)
        self.speed, self.pace = "", 0.0  # as they were last measured; seconds a step
        self.ended = False

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    # -- Trainer's events ---------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = False
        if state.is_world_process_zero and not self.quiet:
            self.training = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, facts="")
            self._tick(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training is not None:
            self._tick(args, state)
            self.bar.update(self.training, completed=state.global_step, facts=self.facts())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        if self.training is None or not logs:
            return
        found = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(("_runtime", "_per_second"))}
        if found:
            best = getattr(state, "best_global_step", None) if self.ended else None
            what = f"step {state.global_step}: evaluation" if best is None else f"the best, of step {best}: evaluation"
            self._line(f"{what} " + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, (int, float))))
        elif "loss" in logs and not self.console.is_terminal:
            self._line(f"step {state.global_step}/{state.max_steps}: {self.facts()}, {self._left(state)} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True  # what is evaluated from here on is what is kept

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if self.quiet or not state.is_world_process_zero:
            return
        if self.testing is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.testing = self.bar.add_task("evaluating", total=total, facts="")
        self.bar.advance(self.testing)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.testing is not None:
            self.bar.remove_task(self.testing)
            self.testing = None
        self.times.clear()  # the time of an evaluation is not that of a step

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    # -- what is said -------------------------------------------------------------------------------------------------
    def facts(self) -> str:
        """Loss, speed and memory in one line."""
        out = [f"loss {self.loss:.4f}"] if self.loss is not None else []
        return ", ".join([*out, *([self.speed] if self.speed else []), f"{size(memory())}"])

    def _tick(self, args: Any, state: Any) -> None:
        rows = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.times.append((time.perf_counter(), state.num_input_tokens_seen, rows))
        (t0, tokens0, rows0), (t1, tokens1, rows1) = self.times[0], self.times[-1]
        if t1 > t0:
            self.speed = f"{(tokens1 - tokens0) / (t1 - t0):,.0f} tokens/s" if tokens1 > tokens0 else f"{(rows1 - rows0) / (t1 - t0):,.1f} examples/s"
            self.pace = (t1 - t0) / (len(self.times) - 1)

    def _left(self, state: Any) -> str:
        if not self.pace:
            return "?"
        minutes, seconds = divmod(round(self.pace * (state.max_steps - state.global_step)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def _line(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def memory() -> int:
    """Bytes: the most that torch has held on the GPU, else what this process holds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def size(count: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
