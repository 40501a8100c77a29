"""A module's call while parts stand for its tensors in some rows, or by a gate that varies within the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import AdapterError
from .routing import Frame, Run, cut, folds, select_rows, widen_rows, with_own_caches

if TYPE_CHECKING:
    from .host import Host
    from .methods.part import Part


def with_now(host: Host, now: list[Part], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The module's call with the tensor parts `now` in force, and no others of those that it reads."""
    owners = {id(p.owner): p.owner for p in host.parts if p.acts == "tensor"}
    owners.setdefault(id(host), host)
    before = [(o, o.now) for o in owners.values()]
    try:
        for o in owners.values():
            o.now = {}
        for p in now:
            p.owner.now.setdefault(p.site.tensor or "weight", []).append(p)
        return forward(*args, **kwargs)
    finally:
        for o, b in before:
            o.now = b


def run_tensors(host: Host, parts: list[Part], x: Tensor, forward: Callable[..., Any], args: Any, kwargs: Any, frame: Frame) -> Any:
    """Parts whose gate or rows vary within the batch: y + g · (f(x; p') - f(x; p)), in their rows."""
    routing = frame.routing
    plain = [p for p in host.parts if p.acts == "tensor" and p.adapter in host.state.active and not needs_call(p)]
    plain = [] if routing is not None else plain
    dim, n = host.batch_dim, x.shape[host.batch_dim]
    if routing is not None and n == 1 < routing.size and parts:  # positions and the like come once for all rows
        host.state.widened = parts[0]
        n = routing.size
        args, kwargs = widen_rows((args, kwargs), n, dim)
        x = first_of(args, kwargs)
    groups: dict[Any, list[Part]] = {}
    for part in parts:  # what does not vary within an adapter's rows goes through the module together
        groups.setdefault((part.adapter, id(part) if needs_call(part) else 0), []).append(part)
    runs = host.runs(parts, x, frame)
    if runs is not None and not frame.cached and not kwargs and all(a is x for a in args) and not any(map(needs_call, parts)):
        y = _in_runs(host, runs, parts, x, forward, frame)
        if y is not None:
            return y
    changed = []
    for (adapter, varies), members in groups.items():
        rows = host.rows(members[0], n, x.device, frame)
        if rows is not None and rows.numel() == 0:
            continue
        a = with_own_caches((args, kwargs), frame)
        # what runs a second time must not count twice in the running means of the gates within
        own = replace(frame, memo=None if frame.memo is None else dict(frame.memo))
        if rows is not None and routing is not None:
            a = select_rows(a, n, dim, rows)
            sub = routing.of(adapter)
            mask, prompt = (routing.select(adapter, t) for t in (frame.mask, frame.prompt))
            own = replace(own, routing=sub, mask=mask, prompt=prompt, batch=frame.batch * sub.size // routing.size)
        a, k = a
        now = plain + members
        gate = members[0].gate if varies else None
        if varies:
            members[0].gate = None
        try:
            host.state.frame = own
            out = with_now(host, now, forward, a, k)
        finally:
            host.state.frame = frame
            if varies:
                members[0].gate = gate
        xs = x.index_select(dim, rows) if rows is not None else x
        changed.append((members[0], xs, out if isinstance(out, Tensor) else out[0], own.mask))
    # the base comes last: what it leaves in a cache is what stays there
    y = with_now(host, [], forward, args, kwargs) if routing is not None else forward(*args, **kwargs)
    first = y if isinstance(y, Tensor) else y[0]
    total = first
    for part, xs, out, mask in changed:
        rows = host.rows(part, first.shape[dim], first.device, frame)
        d = out - (first if rows is None else first.index_select(dim, rows))
        if needs_call(part):
            g = host.gate(part, xs, d, frame, mask, folds(n, frame), width_last=part.gate.per != "token" or d.dim() <= 3)
            d = d * g
        total = total + d if rows is None else total.index_add(dim, rows, d.to(total.dtype))
    return total if isinstance(y, Tensor) else type(y)((total, *y[1:]))


def _in_runs(host: Host, runs: tuple[Run, ...], parts: list[Part], x: Tensor, forward: Callable[..., Any], frame: Frame) -> Tensor | None:
    """f(x; p') run by run, joined; None where f does not give one tensor."""
    routing, dim, n = frame.routing, host.batch_dim, x.shape[host.batch_dim]
    assert routing is not None
    out = []
    try:
        for run, piece in zip(runs, cut(x, runs, routing.size, n, dim), strict=True):
            host.state.frame = routing.frame(frame, run)
            y = with_now(host, [p for p in parts if p.adapter in run.names], forward, (piece,), {})
            if not isinstance(y, Tensor) or y.dim() <= dim or y.shape[dim] != piece.shape[dim]:
                return None
            out.append(y)
    finally:
        host.state.frame = frame
    return torch.cat(out, dim)


def needs_call(part: Part) -> bool:
    """Whether the part's gate varies within a batch, so that it cannot simply replace the tensor."""
    return part.gate is not None and part.gate.per in ("example", "token")


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for a in (*args, *kwargs.values()):
        if isinstance(a, Tensor):
            return a
    raise AdapterError("an adapted module was called without a tensor")
