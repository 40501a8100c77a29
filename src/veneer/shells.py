"""Shells: the generated classes that an adapted module takes on, and how they hand its call to the host.

A module keeps its parameters, its name and its place; only its class is exchanged for a subclass of it made here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .ops.weights import Passed
from .routing import Frame, Routing, shared_by_rows


class HostMixin:
    """A module whose call goes through its host."""

    _veneer_generated = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_veneer_host"].run(super().forward, args, kwargs)  # type: ignore[misc]


class DerivedMixin:
    """A linear module whose own code has no derivative: see ops/weights.py."""

    _veneer_generated = True

    def forward(self, x: Tensor) -> Any:
        return Passed.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else super().forward(x)  # type: ignore[misc]


class FrameMixin:
    """A tower: notes its mask, batch size and cache before its layers run."""

    _veneer_generated = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host = self.__dict__["_veneer_host"]
        state = host.state
        given = dict(zip(host.signature.parameters, args, strict=False))
        given.update(kwargs)
        before = state.frame
        frame = replace(before, batch=before.batch or _batch(given, host.batch_dim))
        if "attention_mask" in given:
            mask = given["attention_mask"]
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
                frame = replace(frame, mask=mask)
        cache = next((given[k] for k in ("cache", "past_key_values", "cache_params") if given.get(k) is not None), None)
        past = before.past
        if cache is not None:
            from .embed import cache_size

            past = cache_size(given)
        memo = frame.memo
        if cache is not None and hasattr(cache, "__dict__"):
            memo = cache.__dict__.setdefault("_veneer_memo", {})
        elif memo is None and not torch.is_grad_enabled():
            memo = {}
        state.frame = replace(frame, cached=cache is not None, past=past, memo=memo)
        if before.routing is not None and not before.batch:
            state.widened = None
            state.ready(before.routing, isinstance(past, Tensor) or past > 0)
        try:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as e:
            if state.widened is None:
                raise
            raise shared_by_rows(state.widened) from e
        finally:
            state.frame = before
        if memo:
            _keep_memo(out, memo, before.routing)
        return out


def _batch(given: dict[str, Any], dim: int) -> int:
    for v in given.values():
        if isinstance(v, Tensor) and v.dim() > dim:
            return v.shape[dim]
    return 0


def _keep_memo(out: Any, memo: dict[Any, Tensor], routing: Routing | None) -> None:
    cache = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
    if cache is None or not hasattr(cache, "__dict__"):
        return
    cache.__dict__["_veneer_memo"] = memo
    reorder = getattr(cache, "reorder_cache", None)
    if reorder is not None and not hasattr(reorder, "veneer"):

        def reorder_both(beams: Tensor) -> Any:
            for key, value in memo.items():
                at = beams.to(value.device)
                rows = None if routing is None else routing.rows(key.adapter, at.shape[0], at.device)
                if rows is not None:  # the sums of a routed gate are those of its own rows, counted among themselves
                    at = torch.searchsorted(rows, at.index_select(0, rows))
                memo[key] = value.index_select(1, at)
            return reorder(beams)

        reorder_both.veneer = True  # type: ignore[attr-defined]
        cache.reorder_cache = reorder_both


class LayerMixin:
    """A layer that may be checkpointed: the frame travels with its arguments, so that the recomputation in the
    backward pass sees the same routing and mask as the forward pass did."""

    _veneer_generated = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "gradient_checkpointing", False) and self.training:  # type: ignore[attr-defined]
            kwargs["_veneer_frame"] = self.__dict__["_veneer_host"].state.frame
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, _veneer_frame: Frame | None = None, **kwargs: Any) -> Any:
        state = self.__dict__["_veneer_host"].state
        # a compiler that traces the checkpoint allows no change to what lies outside, and none is needed in the forward pass
        if _veneer_frame is None or state.frame is _veneer_frame:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, state.frame = state.frame, _veneer_frame
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state.frame = before


class ProductMixin:
    """A module whose own forward is y = W x + b with W from its `Product`, where it has one."""

    _veneer_generated = True

    def forward(self, x: Tensor) -> Tensor:
        p = self.__dict__.get("_veneer_product")
        # a model that was moved since keeps to its own weight
        if p is None or x.device != p.weight.w.device:
            return super().forward(x)  # type: ignore[misc]
        return p(x, self.bias)  # type: ignore[attr-defined]


class SavingMixin:
    """A layer that keeps little for the backward pass: see saving.py. It acts outside of what is compiled."""

    _veneer_generated = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        saving = self.__dict__.get("_veneer_saving")
        own = getattr(self, "gradient_checkpointing", False)  # the model's own way comes first
        if saving is None or own or not self.training or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return saving.call(super().__call__, args, kwargs)  # type: ignore[misc]


_CLASSES: dict[Any, type] = {}


def subclass(cls: type, mixins: tuple[type, ...], tensors: tuple[str, ...]) -> type:
    """The generated subclass of `cls` with these mixins, whose attributes `tensors` ask the host for their value.

    It has the name and module of `cls`, since wrapping policies and attention lookups go by them.
    """
    key = (cls, mixins, tensors)
    if key not in _CLASSES:
        body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        body["_veneer_generated"] = True
        for name in tensors:
            body[name] = _tensor_property(name)
        _CLASSES[key] = type(cls.__name__, (*mixins, cls), body)
    return _CLASSES[key]


def _tensor_property(name: str) -> property:
    def get(self: Any) -> Any:
        p = self.__dict__["_parameters"][name]
        return p if p is None else self.__dict__["_veneer_host"].tensor(name, p)

    return property(get)
