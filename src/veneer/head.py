"""A causal language model whose training loss is computed without logits: see ops/loss.py.

The model's own code stays: in a training call with labels its head answers with `Pending` instead of logits, and its
loss function, given that, computes the fused loss. Whatever else a model does with its logits first (soft caps,
scales, a loss of its own) makes a `Pending` compute them, so the result is right in any model, and fused in most.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import autocasting
from .code import own_class
from .ops.loss import linear_cross_entropy


class Pending:
    """Logits that nobody has needed yet."""

    def __init__(self, head: nn.Module, h: Tensor) -> None:
        self.head, self.h, self.made = head, h, None

    made: Tensor | None

    def tensor(self) -> Tensor:
        made = self.made
        if made is None:
            made = self.made = F.linear(self.h, self.head.weight, self.head.bias)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __len__(self) -> int:
        return len(self.tensor())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_made(args), **_made(kwargs or {}))


def _made(value: Any) -> Any:
    if isinstance(value, Pending):
        return value.tensor()
    if isinstance(value, (tuple, list)):
        return type(value)(_made(v) for v in value)
    return {k: _made(v) for k, v in value.items()} if isinstance(value, dict) else value


def _operator(name: str) -> Any:
    def method(self: Pending, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*_made(args))

    return method


for _name in "add radd sub rsub mul rmul truediv rtruediv matmul neg getitem setitem iadd imul itruediv".split():
    setattr(Pending, f"__{_name}__", _operator(f"__{_name}__"))


class FusedHead:
    """What `optimize` puts on a causal language model and takes off again."""

    def __init__(self, model: Any, head: nn.Module, compile: bool) -> None:
        self.head, self.compile, self.armed = head, compile, False
        self.own_loss = model.loss_function
        self.had_loss = model.__dict__.get("_loss_function")
        self.labels_at = list(inspect.signature(own_class(model).forward).parameters).index("labels") - 1
        self.hooks = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        )
        head.forward = self.forward  # type: ignore[method-assign]
        model.loss_function = self.loss

    def remove(self, model: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        del self.head.forward  # type: ignore[misc]
        if self.had_loss is None:
            del model._loss_function
        else:
            model.loss_function = self.had_loss

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        labels = kwargs.get("labels", args[self.labels_at] if len(args) > self.labels_at else None)
        frozen = not any(p.requires_grad for p in self.head.parameters()) and "_veneer_host" not in self.head.__dict__
        self.armed = labels is not None and frozen and model.training and torch.is_grad_enabled()

    def after(self, model: nn.Module, args: Any, out: Any) -> Any:
        self.armed = False
        if isinstance(out, dict) and any(isinstance(v, Pending) for v in out.values()):
            return type(out)(**{k: None if isinstance(v, Pending) else v for k, v in out.items()})
        if isinstance(out, tuple):
            return tuple(v for v in out if not isinstance(v, Pending))
        return out

    def forward(self, h: Tensor) -> Any:
        return Pending(self.head, h) if self.armed else type(self.head).forward(self.head, h)

    def loss(
        self, logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100, shift_labels: Any = None, **kwargs: Any
    ) -> Any:
        if not isinstance(logits, Pending) or logits.made is not None or autocasting(logits.h):
            return self.own_loss(
                _made(logits), labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index, shift_labels=shift_labels, **kwargs
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        h, (w, b) = logits.h, (self.head.weight, self.head.bias)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(h.device)
        return linear_cross_entropy(h, w, b, shift_labels.to(h.device), num_items_in_batch, ignore_index, compile=self.compile)


def fused_head(model: Any, compile: bool) -> FusedHead | None:
    """Put a fused loss on `model`, if it is a causal language model with a plain head and transformers' own loss."""
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss

        head, loss = model.get_output_embeddings(), model.loss_function
    except (AttributeError, ImportError, NotImplementedError, TypeError):
        return None
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in head.__dict__
    takes_labels = "labels" in inspect.signature(own_class(model).forward).parameters
    return FusedHead(model, head, compile) if plain and loss is ForCausalLMLoss and takes_labels else None
