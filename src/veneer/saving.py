"""What layers keep for the backward pass when memory is short: their inputs, on the CPU.

A layer whose input x is at hand can compute all else again. Two ways, one result:
- compiled layers: the compiler is told to keep only the graph's inputs, and the backward graph computes the rest. It does
  so in one graph, so what the backward pass does not need (the last product of a layer) is not computed again;
- others: torch's checkpoint, which runs the layer a second time.

x itself, batch x tokens x width for each layer, goes to pinned CPU memory on a stream of its own while the next layer runs,
and comes back while the layer above is in its backward pass. The last layer's stays, since it is needed at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")  # what would outlive, or meet twice, a layer's call


class Held:
    """One layer's input, away from the device."""

    __slots__ = ("__weakref__", "before", "copy", "device", "here", "ready")

    def __init__(self, x: Tensor, before: Held | None) -> None:
        self.before = None if before is None else weakref.ref(before)
        self.here: Tensor | None = x
        self.copy: Tensor | None = None
        self.ready: Any = None
        self.device = x.device

    def leave(self, stream: Any) -> None:
        """Start the copy to the CPU."""
        x = self.here
        assert x is not None
        if stream is None:
            self.copy = x.new_empty(()).expand(x.shape)
            return
        self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.copy.copy_(x, non_blocking=True)
        x.record_stream(stream)

    def fetch(self, stream: Any) -> None:
        """Start the copy back, unless it is here."""
        if self.here is not None or self.copy is None:
            return
        self.here = torch.empty(self.copy.shape, dtype=self.copy.dtype, device=self.device)
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            self.here.copy_(self.copy, non_blocking=True)
            self.ready = stream.record_event()
        self.here.record_stream(stream)


class Saving:
    """Runs the layers of one model so that they keep their inputs alone."""

    def __init__(self, recompute: bool) -> None:
        self.recompute = recompute
        self.x: Tensor | None = None
        self.last: Any = None  # the input that was held last in this forward pass
        self.streams: dict[torch.device, Any] = {}
        self.hooks = self.pack, self.unpack  # the same two in every call: compiled code is bound to them

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, **{k: None for k in CACHES if k in kwargs}, **({"use_cache": False} if kwargs.get("use_cache") else {})}
        before, self.x = self.x, next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        try:
            with saved_tensors_hooks(*self.hooks):
                if self.recompute:
                    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
                return forward(*args, **kwargs)
        finally:
            self.x = before

    def pack(self, t: Tensor) -> Any:
        x = self.x
        if x is None or t.device.type not in ("cuda", "meta") or not _same(t, x):
            return t
        last = self.last() if self.last is not None else None
        held = Held(t.detach(), last)
        stream = self.stream(t.device)
        if last is not None and last.here is not None and last.copy is not None:
            last.here = None  # its copy is under way, and the layer that it enters has run
        held.leave(stream)
        self.last = weakref.ref(held)
        return held

    def unpack(self, held: Any) -> Tensor:
        if not isinstance(held, Held):
            return held
        stream = self.stream(held.device)
        held.fetch(stream)
        if held.ready is not None:
            torch.cuda.current_stream(held.device).wait_event(held.ready)
            held.ready = None
        x, self.last = held.here, None
        before = held.before() if held.before is not None else None
        if before is not None:
            before.fetch(stream)
        if held.copy is not None:  # for a second backward pass
            held.here = None
        assert x is not None
        return x

    def stream(self, device: torch.device) -> Any:
        """None on the meta device, where nothing is copied: sizes alone count there (simulate.py)."""
        if device.type == "meta":
            return None
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]


def _same(t: Tensor, x: Tensor) -> bool:
    return t.untyped_storage()._cdata == x.untyped_storage()._cdata and t.shape == x.shape and t.storage_offset() == x.storage_offset()


def recomputed() -> Any:
    """While it lasts, compilers compute norms' and activations' results once more in the backward pass instead of keeping them: they
    keep a low-rank map's input otherwise, though what it was made of is there already. A quarter of a step's memory for about
    1% of its time (Llama 1B, 8 x 1024 tokens, H100)."""
    import torch._functorch.config as config

    return config.patch(ban_recompute_materialized_backward=False)


def recomputing(graph: Any, inputs: Any, mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """torch's own compiler, inductor, with `recomputed`."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    with recomputed():
        return compile_fx(graph, inputs, config_patches={**(list_mode_options(mode) if mode else {}), **(options or {})})


def budgeted(backend: Any, share: float) -> Callable[..., Any]:
    """The compiler `backend`, with this share (0: only the inputs) of what it would keep of a graph for the backward pass."""
    import torch._functorch.config as config
    from torch._dynamo import lookup_backend

    inner = lookup_backend(backend) if isinstance(backend, str) else backend

    def compile(graph: Any, inputs: Any, **options: Any) -> Any:
        with config.patch(activation_memory_budget=share):
            return inner(graph, inputs, **options)

    return compile
