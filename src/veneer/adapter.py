"""Named adapters: which are active, switched off, or routed to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, CapabilityError, did_you_mean
from .plan import Plan, short, whole
from .state import State

if TYPE_CHECKING:
    from .methods.part import Part


@dataclass
class Record:
    """One attached adapter."""

    name: str
    plan: Plan
    parts: list[Part]


class Adapter:
    """A handle on an attached adapter: its name, plan, parts and parameters.

    Once the adapter is detached, everything but the name raises AdapterError.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def _record(self) -> Record:
        from .attach import state_of

        state = state_of(self.model)
        return state.adapters[known(state, self.name)]

    @property
    def plan(self) -> Plan:
        return self._record().plan

    @property
    def parts(self) -> list[Part]:
        """One for each method and site."""
        return list(self._record().parts)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in the saved file, each tensor once; without what is saved but never trained."""
        from .store import tensors_of

        held = {id(p) for part in self._record().parts if part.held for k, p in part.named_parameters() if not k.startswith("gate.")}
        for key, t in tensors_of(self.model, self._record(), fold=False).items():
            if isinstance(t, nn.Parameter) and id(t) not in held:
                yield key, t

    def parameters(self) -> Iterator[Tensor]:
        for _, p in self.named_parameters():
            yield p

    @property
    def num_parameters(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.parameters())

    def save(self, path: Any, **kwargs: Any) -> None:
        """vn.save(model, path, name=self.name)."""
        from .store import save

        save(self.model, path, name=self.name, **kwargs)

    def __repr__(self) -> str:
        state = self.model.__dict__.get("_veneer_state")
        if state is None or self.name not in state.adapters:
            return f"Adapter({self.name!r}, detached)"
        return f"Adapter({self.name!r}, {self.num_parameters:,} parameters in {len(self.parts)} parts)"


def known(state: State, name: Any) -> str:
    """`name`, if it is attached. Raises: AdapterError with the nearest."""
    if not isinstance(name, str) or name not in state.adapters:
        raise AdapterError(f"no adapter called {short(name)} is attached", fix=did_you_mean(str(name), state.adapters))
    return name


def known_names(state: State, names: Any) -> tuple[str, ...]:
    """`names` (one, several, or None for none) as a tuple. Raises: AdapterError for one unknown, or named twice."""
    if names is None:
        return ()
    wanted = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for n in wanted:
        known(state, n)
    if len(set(wanted)) != len(wanted):
        raise AdapterError(f"a name twice in {list(wanted)}", fix="Name each adapter once")
    return wanted


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Make `names` the active adapters: one, several (their deviations add, in any order), or None (the base).

    Raises: AdapterError for a name that is not attached, or stands there twice, and while adapters are merged.
    """
    from .attach import state_of

    state = state_of(model)
    wanted = known_names(state, names)
    if state.merged is not None:
        raise AdapterError("adapters are merged into this model", fix="vn.unmerge(model) first")
    state.active = wanted
    state.refresh()


def active(model: nn.Module) -> tuple[str, ...]:
    """The names of the active adapters; none while some are merged. Raises: AdapterError where nothing is attached."""
    from .attach import state_of

    return state_of(model).active


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base, exactly; merged adapters are taken out for the time. Blocks nest, and end
    in an exception as they end otherwise.

    Raises: AdapterError where nothing is attached.
    """
    from .attach import state_of
    from .merge import merge, unmerge

    state = state_of(model)
    merged = state.merged
    if merged is not None:
        unmerge(model)
    before, state.enabled = state.enabled, False
    try:
        yield model
    finally:
        state.enabled = before
        if merged is not None:
            merge(model, merged.names, into=merged.into)


@contextmanager
def route(model: nn.Module, rows: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Within the block row i of every batch uses the adapter `rows[i]`: a name, several names (they add), or None.

    Works in inference, generate (beams follow their row: a batch of k times as many rows gives each name k in a row) and
    training, where each adapter's gradient comes from its own rows. The routing is part of what gradient checkpointing
    recomputes.

    Raises: AdapterError for an unknown name, or when a batch has not the rows that were named; CapabilityError for a
    method that cannot be routed.
    """
    from .attach import state_of
    from .install import exchange, frame_hosts
    from .slots import prepare

    state = state_of(model)
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not len(rows):
        raise AdapterError("route takes a list with a name (or None) for each row of the batch", fix="For example ['sst2', None]")
    by_row = [known_names(state, r) for r in rows]
    for r in by_row:
        for n in r:
            for term in state.adapters[n].plan.terms():
                if not term.method.routable:
                    raise CapabilityError(f"{term.method.name} (in {n!r}) cannot be routed to rows")
    if state.merged is not None:
        raise AdapterError("adapters are merged into this model", fix="vn.unmerge(model) first")
    if not state.routable:
        from .install import layer_paths

        touched: dict[str, set[type]] = {}
        frame_hosts(model, state, touched, layer_paths(model))
        for path, kinds in touched.items():
            exchange(model, state, path, kinds)
        state.routable = True
    before = state.frame
    state.frame = replace(before, routing=prepare(model, state, by_row))
    try:
        yield model
    finally:
        state.frame = before


@contextmanager
def prompted(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Within the block the first `lengths[i]` real tokens of row i are its prompt, and the rest its answer.

    For methods that act at chosen tokens (vn.LoReFT(positions='last:4')): 'last' then counts back from the prompt's end, as
    it does in generation, where the call holds the prompt alone. Raises: AdapterError where nothing is attached, or for a
    length that is no whole number of at least 1.
    """
    from .attach import state_of

    state = state_of(model)
    given = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not given or any(not whole(n) for n in given):
        raise AdapterError(f"lengths={short(given)}", fix="Give the number of the prompt's tokens for each row, as [12, 9]")
    before = state.frame
    state.frame = replace(before, prompt=torch.tensor(given))
    try:
        yield
    finally:
        state.frame = before


def skip(model: nn.Module, layers: int, name: str | None = None) -> None:
    """Leave the adapter `name` (default: the active ones) out of the `layers` lowest layers from now on (AdapterDrop).

    The parameters stay, and are saved with the plan, which then says skip=`layers`; 0 brings them all back. Nothing below
    the first layer in use is computed, or given a gradient.

    Raises: AdapterError for an unknown name or a number under 0; CapabilityError where no method of the plan can be skipped.
    """
    from .attach import state_of

    state = state_of(model)
    if not whole(layers, 0):
        raise AdapterError(f"layers={short(layers)}", fix="Give how many of the lowest layers to leave out, as 5")
    for n in state.active if name is None else (known(state, name),):
        record = state.adapters[n]
        able = [t.method for t in record.plan.terms() if hasattr(t.method, "skip")]
        if not able:
            raise CapabilityError(f"no method of {n!r} can be left out of lower layers", fix="vn.Bottleneck and vn.Compacter can, or narrow at='…@5:'")
        record.plan = Plan.from_dict(_with(record.plan.to_dict(), {m.name for m in able}, layers))
        for part in record.parts:
            if hasattr(part, "skip"):
                part.skip = layers


def _with(data: Any, names: set[str], layers: int) -> Any:
    """A plan's data with skip=`layers` in the methods called `names`."""
    if isinstance(data, list):
        return [_with(d, names, layers) for d in data]
    if not isinstance(data, dict):
        return data
    out = {k: _with(v, names, layers) for k, v in data.items()}
    return {**out, "skip": layers} if data.get("method") in names else out
