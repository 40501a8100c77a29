"""Training one candidate on part or all of the steps, on transformers' Trainer; the model is left as it was."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..attach import attach, detach
from ..calls import device_of
from ..errors import VeneerError
from ..plan import Plan
from . import measure
from .data import Data

LEAST_ROWS, LEAST_SCORED = 32, 100  # examples that a part of the training takes and is scored on at least


@dataclass(frozen=True)
class Job:
    """Train `plan` at `rate` on a `share` of the steps; `measured`: time inference and count memory too."""

    plan: dict[str, Any]
    rate: float
    share: float
    measured: bool = False
    deadline: float = math.inf  # of time.time()


@dataclass
class Worker:
    """Trains candidates on one model: a Job in, plain data out. It can be pickled, and so be sent elsewhere.

    steps, batch_size, warmup, weight_decay  of the whole training, as in `veneer train`
    """

    model: nn.Module
    data: Data
    steps: int
    batch_size: int = 16
    eval_batch_size: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0

    def __call__(self, job: Job) -> dict[str, Any]:
        """score, noise, replicates, loss and score curves, steps, examples, seconds; where `measured`, latency and memory.
        `status` is 'complete', 'diverged', 'failed' or 'unfinished'; `why` says so in words.

        The same job gives the same answer in any order and process: seed, batches and start are the job's own, and the
        random state of the caller comes back.
        """
        begin = time.perf_counter()
        out: dict[str, Any] = {"status": "complete", "why": "", "loss": [], "score": None, "steps": 0, "examples": 0, "train_seconds": 0.0}
        if time.time() >= job.deadline:
            return out | {"status": "unfinished", "why": "the time was up before it began", "seconds": 0.0}
        try:
            with own_random_state(), quiet():
                self._train(job, out)
                if job.measured and out["status"] == "complete":
                    out |= self.measures(Plan.from_dict(job.plan))
        except VeneerError as e:
            out |= {"status": "failed", "why": str(e)}
        except (RuntimeError, ValueError, ArithmeticError) as e:  # out of memory, a size that a kernel refuses: this candidate's, not the search's
            out |= {"status": "failed", "why": f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"}
        out["seconds"] = time.perf_counter() - begin
        return out

    def measures(self, plan: Plan) -> dict[str, float]:
        """latency, base_seconds, memory."""
        quotient, base = measure.latency(self.model, plan, self.data.batch("evaluation", self.batch_size))
        return {"latency": quotient, "base_seconds": base, "memory": self.memory(plan)}

    def memory(self, plan: Plan) -> int:
        return measure.memory(self.model, plan, self.data.batch("train", self.batch_size, longest=True))

    def steps_of(self, share: float) -> int:
        return max(1, round(self.steps * share))

    def _train(self, job: Job, out: dict[str, Any]) -> None:
        from transformers import TrainingArguments, set_seed

        from ..train.trainer import AdapterTrainer, Advance

        steps = self.steps_of(job.share)
        # each example about once in a part of the training: more of them say more than the same ones again
        rows = self.data.rows(min(1.0, steps * self.batch_size / len(self.data.train)), "train", LEAST_ROWS)
        held = self.data.rows(job.share, "evaluation", LEAST_SCORED)
        device = device_of(self.model)
        modes = {m: m.training for m in self.model.modules()}
        set_seed(self.seed)
        plan = Plan.from_dict(job.plan)
        shown = [self.data.batch("train", self.batch_size)] if any(m.needs_data for m in plan.leaves()) else None
        adapter = attach(self.model, plan, name=measure.NAME, batches=shown)
        watch = _watch(out, job.deadline)
        try:
            with tempfile.TemporaryDirectory() as folder:
                args = TrainingArguments(
                    output_dir=folder, max_steps=steps, per_device_train_batch_size=self.batch_size, learning_rate=job.rate, weight_decay=self.weight_decay,
                    warmup_steps=int(self.warmup * steps), seed=self.seed, logging_steps=max(1, steps // 25), logging_nan_inf_filter=False, save_strategy="no",
                    eval_strategy="no", report_to="none", remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, log_level="error",
                    use_cpu=device.type == "cpu", dataloader_pin_memory=False,
                )  # fmt: skip
                args._n_gpu = min(1, args.n_gpu)  # one model, whole, where the user put it
                examples = [self.data.train[i] for i in rows]
                trainer = AdapterTrainer(
                    model=self.model,
                    args=args,
                    train_dataset=examples,
                    data_collator=self.data.collate,
                    callbacks=[watch, Advance()],  # type: ignore[arg-type]
                )
                trainer.adapter_name = measure.NAME
                _silence(trainer)
                measure.wait(device)
                begin = time.perf_counter()
                trainer.train()
                measure.wait(device)
                out["train_seconds"] = time.perf_counter() - begin
            out["steps"], out["examples"] = trainer.state.global_step, trainer.state.global_step * self.batch_size
            if out["status"] == "complete" and not all(bool(torch.isfinite(p).all()) for p in adapter.parameters()):
                out |= {"status": "diverged", "why": "its parameters are no finite numbers"}
            if out["status"] != "diverged":
                self._score(out, held)
        finally:
            detach(self.model, measure.NAME)
            for m, mode in modes.items():
                m.training = mode

    def _score(self, out: dict[str, Any], held: list[int]) -> None:
        score, replicates = self.data.score(self.model, held, self.eval_batch_size)
        if not math.isfinite(score):
            out |= {"status": "diverged", "why": "its outputs are no finite numbers"}
            return
        out |= {"score": score, "replicates": [round(r, 6) for r in replicates], "noise": float(np.std(replicates, ddof=1)) if len(replicates) > 1 else 0.0}


def _silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _watch(out: dict[str, Any], deadline: float) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Notes the loss; ends a training that diverges or whose time is up."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs:
                return
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                out.update(status="diverged", why=f"its loss is no finite number at step {state.global_step}")
                control.should_training_stop = True
            else:
                out["loss"].append([state.global_step, loss])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if time.time() > deadline and state.global_step < state.max_steps:
                out.update(status="unfinished", why=f"the time was up at step {state.global_step} of {state.max_steps}")
                control.should_training_stop = True

    return Watch()


@contextmanager
def own_random_state() -> Iterator[None]:
    """What is drawn within does not change what is drawn after."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if kept[3] is not None:
            torch.cuda.set_rng_state_all(kept[3])


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Trainer prints."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
