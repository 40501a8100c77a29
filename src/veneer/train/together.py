"""Several processes (torchrun, accelerate launch): what they must decide alike, and what each does by itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def meet() -> int:
    """Join the group of processes that a launcher has started, as transformers does, and return how many there are."""
    from transformers import TrainingArguments

    return TrainingArguments(use_cpu=not torch.accelerator.is_available()).world_size


def processes() -> int:
    """How many train together; 1 where no group has been made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


def gathered(thing: Any) -> list[Any]:
    """What each process has, in their order; all must call it."""
    if processes() == 1:
        return [thing]
    out: list[Any] = [None] * processes()
    dist.all_gather_object(out, thing)
    return out


def some(flag: bool, device: Any = "cpu") -> bool:
    """Whether it holds in one process at least; all must call it. One number is sent, so that it costs little at each step."""
    if processes() == 1:
        return flag
    number = torch.tensor(int(flag), device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number)


@contextlib.contextmanager
def alone(trainer: Any) -> Iterator[None]:
    """Within the block `trainer` gathers nothing: a pass that fails in one process, or that others do not make, would leave
    them waiting for it."""
    own = {"gather": lambda t: t, "gather_for_metrics": lambda t, *a, **k: t, "pad_across_processes": lambda t, *a, **k: t}
    vars(trainer.accelerator).update(own)  # over the class's methods
    before = trainer.gather_function, trainer.args.average_tokens_across_devices
    trainer.gather_function, trainer.args.average_tokens_across_devices = own["gather_for_metrics"], False
    try:
        yield
    finally:
        trainer.gather_function, trainer.args.average_tokens_across_devices = before
        for name in own:
            delattr(trainer.accelerator, name)


class Share:
    """This process's share of the rows that `loader` deals out: whole batches, each in one process. `rows` says how many the
    batch at hand has.

    A loader of accelerate's gives each process as many rows, the last ones twice; the copies are dropped from what is
    gathered, but they count in the mean that a batch's loss is.
    """

    def __init__(self, loader: Any, size: int) -> None:
        from torch.utils.data import DataLoader, Subset

        self.all, self.size, self.rows = len(loader.dataset), size, 0
        per = math.ceil(math.ceil(self.all / size) / processes()) * size
        self.dataset = Subset(loader.dataset, range(self.all)[rank() * per : (rank() + 1) * per])
        self.loader = DataLoader(self.dataset, batch_size=size, collate_fn=loader.collate_fn) if len(self.dataset) else []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.loader):
            self.rows = min(self.size, len(self.dataset) - i * self.size)
            yield batch


def merged(outputs: list[Any], compute: Any, prefix: str) -> Any:
    """The EvalLoopOutput of all rows, from those of each process's share in order; `compute` scores the predictions."""
    from transformers.trainer_pt_utils import nested_concat
    from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

    found = [o for o in outputs if o.num_samples]
    rows = sum(o.num_samples for o in found)
    predictions, labels = found[0].predictions, found[0].label_ids
    for o in found[1:]:
        predictions, labels = (None if a is None else nested_concat(a, b, padding_index=-100) for a, b in ((predictions, o.predictions), (labels, o.label_ids)))
    metrics = {f"{prefix}_loss": sum(o.metrics[f"{prefix}_loss"] * o.num_samples for o in found) / rows}
    if compute is not None and predictions is not None and labels is not None:
        metrics |= {f"{prefix}_{k}": float(v) for k, v in compute(EvalPrediction(predictions=predictions, label_ids=labels)).items()}
    return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=metrics, num_samples=rows)
