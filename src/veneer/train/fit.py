"""Whether a batch fits: the longest rows are tried before the first step, and memory is measured rather than guessed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .together import alone, some

ROOM = 0.9  # of the free memory; the rest is for what an allocator cannot reuse
ADAM = 12  # bytes for each trained number: its gradient and two moments in fp32


@dataclass(frozen=True)
class Estimate:
    """Bytes: of the model's numbers; of gradients and AdamW's moments; of what the backward pass keeps for one row of the
    longest; and what the device has free (None where that cannot be told)."""

    weights: int
    optimiser: int
    row: int
    free: int | None

    def total(self, rows: int) -> int:
        return self.weights + self.optimiser + rows * self.row

    def fits(self, rows: int) -> bool:
        on_device = self.weights  # are there already, and so not in what is free
        return self.free is None or self.total(rows) - on_device <= ROOM * self.free


def estimate(trainer: Any, row: dict[str, Any]) -> Estimate:
    """Measured by one forward pass of `row`: every tensor that autograd keeps for the backward pass, once."""
    model = trainer.model
    base = [s for t in (*model.parameters(), *model.buffers()) for s in storages(t)]
    own = {s.data_ptr() for s in base}
    kept: dict[int, int] = {}

    def see(t: torch.Tensor) -> torch.Tensor:
        kept.update((s.data_ptr(), s.nbytes()) for s in storages(t) if s.data_ptr() not in own)
        return t

    held = []
    with aside(trainer), torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), see(t))[1], lambda t: t):
        _loss(trainer, [row])
    weights = sum({s.data_ptr(): s.nbytes() for s in base}.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Estimate(weights, trained * ADAM, sum(kept.values()), free_memory(next(model.parameters()).device))


def storages(t: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of a tensor; of one made of others (torchao's quantised weights) that of each."""
    if hasattr(t, "__tensor_flatten__"):
        for name in t.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from storages(getattr(t, name))
    else:
        yield t.untyped_storage()


def roomy(trainer: Any, row: dict[str, Any], rows: int) -> bool:
    """Whether `rows` rows like `row` fit by the estimate, in every process; not where even measuring one runs out of memory."""
    try:
        fits = estimate(trainer, row).fits(rows)
    except (RuntimeError, MemoryError) as e:
        if not ran_out(e):
            raise
        fits = False
    return not some(not fits, trainer.args.device)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that the memory was too small: of a GPU, or of the process (a limit, a container) on a CPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # C++'s own, and oneDNN's word where it gets no room for its kernels
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in ("bad_alloc", "could not create a primitive"))
    return said or isinstance(error, Exception) and should_reduce_batch_size(error)


def release(model: Any) -> None:
    """Give back what a pass that ran out of memory had taken."""
    from accelerate.utils.memory import clear_device_cache

    model.zero_grad(set_to_none=True)
    clear_device_cache(garbage_collection=True)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)  # what glibc keeps for itself is no room for the kernels that oneDNN compiles


def free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil  # accelerate needs it too

        return psutil.virtual_memory().available
    return None


def seconds(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Of one forward and backward pass over `rows`, after a first that warms up."""
    for _ in range(2):
        begin = time.perf_counter()
        _try(trainer, rows)
    return time.perf_counter() - begin


def find_micro_batch(trainer: Any, rows: list[dict[str, Any]], batch: int) -> int:
    """The largest micro-batch, `batch` or a divisor of it, with which a forward and backward pass over the first (the
    longest) of `rows` fits beside what the optimiser will hold; in every process, where there are several. Nothing of it
    remains: gradients, buffers and random numbers are as before.

    Raises: ConfigError where one row alone does not fit.
    """
    for micro in (n for n in range(batch, 0, -1) if batch % n == 0):
        full = ""
        try:
            _try(trainer, rows[:micro])
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            full = (str(e).splitlines() or [type(e).__name__])[0]
        if not some(bool(full), trainer.args.device):
            return micro
        release(trainer.model)
        if trainer.task is not None and trainer.task.coupled:
            raise ConfigError(
                f"{micro} rows do not fit the memory, and this loss compares the rows of a batch, so that smaller parts would change it",
                where="batch_size",
                fix=f"batch_size={max(1, micro // 2)}, a smaller max_length, or gradient_checkpointing=true",
            )
    raise ConfigError(
        f"not even one row of the longest fits the memory: {full or 'in another process'}",
        where="max_length",
        fix="A smaller max_length, gradient_checkpointing=true, quantization=nf4, or another model",
    )


def _try(trainer: Any, rows: list[dict[str, Any]]) -> None:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    held = [torch.empty(2 * p.numel(), dtype=torch.float32, device=p.device) for p in trained]  # as AdamW's moments, from the first step on
    with aside(trainer):
        _loss(trainer, rows).backward()
    del held


def _loss(trainer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch)


@contextlib.contextmanager
def aside(trainer: Any) -> Iterator[None]:
    """A pass in training mode, of this process alone, that leaves no trace."""
    model = trainer.model
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    training = model.training
    model.train()
    try:
        with alone(trainer):
            yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, b in model.named_buffers():
                if n in buffers and b.shape == buffers[n].shape:
                    b.copy_(buffers[n])
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if states[3]:
            torch.cuda.set_rng_state_all(states[3])
        for numbers in getattr(trainer, "_metrics", {}).values():  # trl's, averaged at the next log
            numbers.clear()
