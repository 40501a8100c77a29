"""Calling a model that is looked at, not trained: where its inputs go, and the mode that comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def moved(batch: Any, device: torch.device) -> dict[str, Any]:
    """A dict of inputs with its tensors on `device`."""
    return {k: _to(v, device) for k, v in batch.items()}


def call(model: nn.Module, batch: Any) -> Any:
    """The model's answer to one batch: a dict of inputs, a tuple of positional ones, or the one input."""
    device = device_of(model)
    if isinstance(batch, (tuple, list)):
        return model(*[_to(b, device) for b in batch])
    if hasattr(batch, "items"):
        return model(**moved(batch, device))
    return model(_to(batch, device))


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module's own mode comes back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def autocasting(x: Tensor) -> bool:
    """Whether operations on `x` are autocast now; the meta device does not know the question."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
