"""Attaching and detaching named adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .build import make_parts
from .compose.held import copy_numbers, written_out
from .errors import AdapterError
from .install import install, uninstall
from .methods.part import module_at
from .plan import Plan
from .probe import Probe
from .state import State
from .structure import base_modules, base_parameters

if TYPE_CHECKING:
    from .adapter import Adapter, Record


def state_of(model: nn.Module, create: bool = False) -> State:
    """What is attached to `model`. Raises: AdapterError where nothing is, unless `create`."""
    state = model.__dict__.get("_veneer_state")
    if state is None:
        if not create:
            raise AdapterError("nothing is attached to this model", fix="Attach a plan first: vn.attach(model, plan, name='mine')")
        state = model.__dict__["_veneer_state"] = State(model)
    return state


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or any(c in name for c in "./\\:") or len(name) > 100:
        shown = repr(name) if len(repr(name)) < 120 else repr(name)[:100] + "…"
        raise AdapterError(f"an adapter's name is a word without '.', ':', '/' or '\\', not {shown}", fix="For example 'sst2'")


def attach(
    model: nn.Module,
    plan: Plan | str | dict[str, Any] | list[Any],
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    activate: bool = True,
    tokenizer: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Adapter:
    """Attach `plan` to `model` in place, as the adapter `name`; freeze the base; return a handle.

    The base's parameters keep their names, values and identity; `model` keeps its class and methods. New parameters
    are registered under the modules where they act, so optimisers, DDP and FSDP find them.

    plan       a plan, a preset's name, or what Plan.from_dict takes
    dtype      of the new parameters; default fp32 (fp64 on an fp64 base), also on a half-precision base: they are cast
               to the activations' dtype when used
    activate   make it the one active adapter (True), or leave the active ones as they are
    tokenizer  for vn.PromptTuning(init='text')
    batches    as in training, for methods whose start depends on data (EVA, LoRA-GA, Fisher and gradient masks)
    loss       the model's output -> the loss to differentiate there; default its `loss`

    Raises: PlanError, SiteError (a pattern or port that the model does not have), AdapterError (the name is taken).
    After an error the model is exactly as it was.
    """
    from .adapter import Record, known

    plan = Plan.from_dict(plan)
    check_name(name)
    check_free(model, name)
    probe = None if batches is None else Probe(model, batches, loss)
    sources: list[Any] = []
    if plan.unresolved():
        state = state_of(model)
        plan, sources = written_out(plan, lambda n: state.adapters[known(state, n)])
    parts = make_parts(model, plan, dtype, tokenizer, probe=probe, copied=[i for i, source in enumerate(sources) if source is not None])
    copy_numbers(parts, sources)
    return join(model, Record(name, plan, parts), activate)


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter may be attached to `model` as `name`."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"adapters are attached to a torch module, not to {model!r}")
    if "_veneer_state" in model.__dict__:
        state = state_of(model)
        if name in state.adapters:
            raise AdapterError(f"an adapter called {name!r} is attached already", fix=f"Detach it first, or choose another name than {name!r}")
        if state.merged is not None:
            raise AdapterError("adapters are merged into this model", fix="vn.unmerge(model) first")
        if state.resting:
            raise AdapterError("the base's weights are in CPU memory (offload_base)", fix="vn.unoptimize(model) first, and optimise again afterwards")
    for path, module in base_modules(model):
        if path and "_veneer_state" in module.__dict__:
            raise AdapterError("a part of this model has adapters of its own", where=path, fix="Attach to that part, or detach there first")


def join(model: nn.Module, record: Record, activate: bool) -> Adapter:
    """Install the parts of `record`, freeze the base, and return a handle. An error leaves the model as it was."""
    from .adapter import Adapter

    name, state = record.name, state_of(model, create=True)
    if not state.trainable:
        state.trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        install(model, state, record)
    except BaseException:
        uninstall(model, state, record)
        _leave(model, state)
        raise
    state.adapters[name] = record
    if activate:
        state.active = (name,)
    state.refresh()
    for _, p in base_parameters(model):
        p.requires_grad_(False)
    return Adapter(model, name)


def _leave(model: nn.Module, state: State) -> None:
    """Undo everything once no adapter is left."""
    if state.adapters:
        return
    for path, host in state.hosts.items():
        module = module_at(model, path)
        module.__dict__.pop("_veneer_host", None)
        module.__class__ = host.original
    for undo in reversed(state.undo):
        undo()
    for n, p in model.named_parameters():
        if n in state.trainable:
            p.requires_grad_(state.trainable[n])
    del model.__dict__["_veneer_state"]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapter `name` (None: all of them). With the last one gone the model is bit for bit what it was:
    classes, parameters, which of them are trainable.

    Merged adapters are unmerged first. Raises: AdapterError for an unknown name, with the nearest.
    """
    from .adapter import known
    from .merge import unmerge

    state = state_of(model)
    names = list(state.adapters) if name is None else [known(state, name)]
    if state.merged is not None and (name is None or name in state.merged.names):
        unmerge(model)
    for n in names:
        record = state.adapters.pop(n)
        uninstall(model, state, record)
        state.active = tuple(a for a in state.active if a != n)
    state.refresh()
    _leave(model, state)
