"""transformers' Trainer, with checkpoints that hold the adapter alone."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..attach import state_of
from ..errors import StoreError
from ..store import read_tensors, save, tensors_of, unfold, write_whole
from ..training import advance, param_groups, penalty

STATE = "training.safetensors"


class AdapterRuns:
    """For any Trainer: it saves and restores `adapter_name` in place of the whole model, trains with the learning rates
    and the penalties that the plan's methods ask for, and takes the loss of `task` where that has one; all else is the
    Trainer's."""

    adapter_name = "adapter"
    task: Any = None

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


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that is whole, or None. Trainer writes its own state last."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / STATE).exists() and (p / "trainer_state.json").exists() and p.name.split("-")[-1].isdigit()]
    return max(whole, key=lambda p: int(p.name.split("-")[-1]), default=None)
