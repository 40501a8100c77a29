"""transformers' Trainer, with checkpoints that hold the adapter alone."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_truncate

from ..attach import state_of
from ..errors import ConfigError, StoreError
from ..store import read_tensors, save, tensors_of, unfold, write_whole
from ..training import advance, param_groups, penalty
from .fit import ran_out, release
from .folder import full_disk
from .together import Share, alone, gathered, merged, processes

STATE = "training.safetensors"


class AdapterRuns:
    """For any Trainer: it saves and restores `adapter_name` in place of the whole model, trains with the learning rates
    and the penalties that the plan's methods ask for, takes the loss of `task` where that has one, and adds the scores of
    `written` (a `Written`) to those of an evaluation; all else is the Trainer's."""

    adapter_name = "adapter"
    task: Any = None
    written: Any = None

    def __init__(self, model: Any = None, **kwargs: Any) -> None:
        # transformers trains a quantised model only where an adapter is attached, and this is how it asks
        if model is not None:
            model._hf_peft_config_loaded = True
        try:
            super().__init__(model=model, **kwargs)
        finally:
            if model is not None:
                del model._hf_peft_config_loaded

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimiser, with the learning rates that the plan's methods ask for."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(param_groups(self.model if model is None else model, self.args.learning_rate, self.args.weight_decay), **options)  # type: ignore[arg-type]
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss, and what the plan's methods add to it in training."""
        if self.task is not None and self.task.loss is not None:
            loss, outputs = self.task.loss(model, inputs)
            found = (loss, outputs) if return_outputs else loss
        else:
            found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return found
        more = penalty(self.model)  # type: ignore[arg-type]
        return (found[0] + more, found[1]) if isinstance(found, tuple) else found + more

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; where the memory is too small for an evaluation batch, with half of it, if the loss allows."""
        while True:
            try:
                return super().evaluate(*args, **kwargs)  # type: ignore[misc]
            except (RuntimeError, MemoryError) as e:
                size = self.args.per_device_eval_batch_size
                if not ran_out(e):
                    raise
                if size == 1 or self.task is not None and self.task.coupled:
                    raise ConfigError("out of memory in an evaluation", where="eval_batch_size", fix="A smaller eval_batch_size or max_length") from None
            release(self.model)
            self.args.per_device_eval_batch_size = size // 2

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with the scores of what the model writes, where that is asked for."""
        found = self._evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.written is not None:
            found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.written(self).items()})
        return found

    def _evaluation_loop(self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's; of several processes each takes its share of the batches, so that the scores are one process's."""
        own = {"metric_key_prefix": metric_key_prefix, **kwargs}
        if processes() == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # shards move in step
            return super().evaluation_loop(dataloader, description, *args, **own)  # type: ignore[misc]
        share, compute, failure, found = Share(dataloader, self.args.per_device_eval_batch_size), self.compute_metrics, None, None
        with alone(self):
            self.gather_function, self.compute_metrics = lambda t, **k: nested_truncate(t, share.rows), None
            try:
                found = super().evaluation_loop(share, description, *args, **own)  # type: ignore[misc]
            except (RuntimeError, MemoryError) as e:
                failure = e
            finally:
                self.compute_metrics = compute
        failures = [f for f in gathered(failure and ran_out(failure)) if f is not None]
        if failures:  # all end alike, or those that go on would wait
            raise failure or (MemoryError() if all(failures) else RuntimeError("the evaluation failed in another process"))
        scores = getattr(self, "_metrics", {}).get("eval")  # trl's: each batch's, by name
        if scores is not None:
            shares = gathered(dict(scores))
            scores.clear()
            for name, values in ((k, v) for each in shares for k, v in each.items()):
                scores[name] += values
        return merged(gathered(found), compute, metric_key_prefix)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with full_disk(Path(self.args.output_dir), writing=True):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        gathered(None)  # the file that says that a checkpoint is whole comes next, from the first process

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        assert folder is not None
        # Trainer calls this in every process, since all must take part where tensors are sharded; one of them writes
        with contextlib.nullcontext(folder) if self.args.should_save else tempfile.TemporaryDirectory() as own:
            save(self.model, own, name=self.adapter_name)  # type: ignore[arg-type]
            keep(self.model, self.adapter_name, own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        fill_from(self.model if model is None else model, self.adapter_name, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            fill_from(self.model, self.adapter_name, best)


class AdapterTrainer(AdapterRuns, Trainer):
    """transformers' Trainer for adapters."""


class Advance(TrainerCallback):
    """Tells the adapters of each optimiser step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advance(model, min(state.global_step + 1, state.max_steps), state.max_steps, kwargs.get("optimizer"))


def tensors_in(model: Any, name: str) -> dict[str, Tensor]:
    """The adapter's tensors as they are trained (nothing folded away), by name; the tensors themselves."""
    return tensors_of(model, state_of(model).adapters[name], fold=False)


def keep(model: Any, name: str, folder: str | Path) -> None:
    """Write the adapter's tensors as they are trained, to go on from."""
    from safetensors.torch import save as to_bytes

    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors_in(model, name).items()}
    write_whole(Path(folder) / STATE, to_bytes(tensors, metadata={"format": "pt"}))


def fill_from(model: Any, name: str, folder: str | Path) -> None:
    """Copy what `keep` wrote in `folder` into the attached adapter `name`. Raises: StoreError."""
    fill_with(model, name, read_tensors(Path(folder) / STATE), str(Path(folder) / STATE))


def fill_with(model: Any, name: str, tensors: dict[str, Tensor], where: str) -> None:
    """Copy `tensors` into the attached adapter `name`. Raises: StoreError where they do not fit, and changes nothing."""
    unfold(state_of(model).adapters[name], tensors)  # an adapter may have another form than it was attached in
    own = tensors_in(model, name)
    for key in own.keys() | tensors.keys():
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
            raise StoreError(f"{key!r} does not fit the plan", where=where, fix="The checkpoint is of another plan: choose another output folder")
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
        for part in state_of(model).adapters[name].parts:
            part.derive()


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that is whole, or None."""
    return max((p for p in folder.glob("checkpoint-*") if _whole(p)), key=lambda p: int(p.name.split("-")[-1]), default=None)


def _whole(checkpoint: Path) -> bool:
    """Trainer writes its own state last: where that can be read, all else is there."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / STATE).exists() and checkpoint.name.split("-")[-1].isdigit()
