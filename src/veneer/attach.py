"""Attaching and detaching: the one place that changes a model, and undoes it exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import resolve
from .compose.gate import Gate
from .embed import signature_of
from .errors import AdapterError, PlanError, VeneerError
from .host import Cell, FrameMixin, Host, HostMixin, LayerMixin, State, subclass
from .methods.base import Build
from .methods.parts import Part, like, module_at
from .plan import Plan, Term
from .sites import Site, select

if TYPE_CHECKING:
    from .adapter import Adapter, Record

KEY = "_veneer"


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
) -> Adapter:
    """Attach `plan` to `model` in place, as the adapter `name`; freeze the base; return a handle.

    The base's parameters keep their names, values and identity; `model` keeps its class and methods. New parameters
    are registered under the modules where they act, so optimisers, DDP and FSDP find them.

    plan       a plan, a preset's name, or what Plan.from_dict takes
    dtype      of the new parameters; default fp32 (fp64 on an fp64 base), also on a half-precision base: they are cast
               to the activations' dtype when used
    activate   make it the one active adapter (True), or leave the active ones as they are
    tokenizer  for vn.PromptTuning(init='text')

    Raises: PlanError, SiteError (a pattern or port that the model does not have), AdapterError (the name is taken).
    After an error the model is exactly as it was.
    """
    from .adapter import Record

    plan = Plan.from_dict(plan)
    check_name(name)
    check_free(model, name)
    return join(model, Record(name, plan, make_parts(model, plan, dtype, tokenizer)), activate)


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
    for path, module in model.named_modules():
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
    for n, p in model.named_parameters():
        if f"{KEY}." not in n:
            p.requires_grad_(False)
    return Adapter(model, name)


def make_parts(model: nn.Module, plan: Plan, dtype: torch.dtype | None = None, tokenizer: Any = None, *, blank: bool = False) -> list[Part]:
    """The parts of `plan` for `model`, not yet installed; `blank` ones have shapes and no numbers. Changes nothing."""
    found = resolve.sites(model)
    parts: list[Part] = []
    for i, term in enumerate(plan.terms()):
        build = Build(model, gated=term.gate is not None, dtype=dtype, tokenizer=tokenizer, blank=blank)

        def sites(at: str | None, port: str, default: str) -> list[Site]:
            why = "" if any(s.port == port for s in found) else resolve.why_not(model, port)
            return select(found, at or default, port=port, default=at is None, why=why)

        try:
            for site, part in term.method.parts(sites, build):
                part.stage, part.method_name = term.stage, term.method.name
                part.term = i
                if term.gate is not None:
                    part.gate = _gate(term, site, part, build)
                    part.published = term.gate.gate == "published" and part.acts == "kv"
                parts.append(part)
        except VeneerError:
            raise
        except (RuntimeError, OverflowError, MemoryError) as e:  # sizes beyond any memory
            raise PlanError(f"{term.method.name} could not be built: {str(e).partition(chr(10))[0]}") from e
    if not parts:
        raise PlanError("the plan attaches to nothing in this model")
    return parts


def _gate(term: Term, site: Site, part: Part, build: Build) -> Gate:
    g = term.gate
    assert g is not None
    per = "example" if part.acts == "embed" and g.per == "token" else g.per
    if part.acts == "kv" and per == "token" and g.gate == "published":
        raise PlanError("gate='published' scales a prefix's keys for a whole example", fix="Use per='example' or gate='deviation'")
    if site.port in ("weight", "param") and site.kind != "embedding":
        module = module_at(build.model, site.enter or site.path)
        width = site.inp if site.kind in ("linear", "transposed") else _width(module, site)
        if site.kind == "experts":
            width = site.out if site.role == "ffn.down" else site.inp
        if site.port == "weight" and site.kind == "conv":
            width = getattr(module, "in_channels", width)
        if site.enter and site.width:
            width = site.width
    elif site.kind == "embedding":
        width = site.out
    elif site.port == "kv":
        enter = module_at(build.model, site.enter)
        width = _width(enter, site)
    else:
        width = site.width
    return Gate(
        width, per=per, bias=g.bias, temperature=g.temperature, causal=site.causal and part.acts != "embed",
        new=like(build, site),
    )  # fmt: skip


def _width(module: nn.Module, site: Site) -> int:
    """Channels of the module's input."""
    for key in ("in_features", "nx", "in_channels", "embed_dim", "hidden_size"):
        if isinstance(getattr(module, key, None), int):
            return getattr(module, key)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    p = module._parameters.get("weight")
    if p is not None:
        return p.shape[-1] if p.dim() == 1 else p.shape[0] if type(module).__name__ == "Conv1D" else p.shape[-1]
    return site.shape[-1] if site.shape else site.inp


# -- installing -------------------------------------------------------------------------------------------------------
def host_of(model: nn.Module, state: State, path: str) -> Host:
    host = state.hosts.get(path)
    if host is None:
        host = state.hosts[path] = Host(path, module_at(model, path), state)
    return host


def install(model: nn.Module, state: State, record: Any) -> None:
    """Put the parts of `record` on their hosts and exchange the hosts' classes."""
    touched: dict[str, set[type]] = {}
    layers = _layer_paths(model)
    varying = any(p.gate is not None and p.gate.per != "constant" for p in record.parts)
    for part in record.parts:
        site = part.site
        part.adapter = record.name
        if part.gate is not None:
            part.gate.adapter = record.name
        part.cell, part.owner = None, None
        module = module_at(model, site.path)
        box = module._modules.get(KEY)
        if box is None:
            box = nn.Module()
            module.add_module(KEY, box)
        mine = box._modules.get(f"@{record.name}")
        if mine is None:
            mine = nn.ModuleList()
            box.add_module(f"@{record.name}", mine)
        mine.append(part)
        part.train(module.training)
        owner = host_of(model, state, site.path)
        reader = host_of(model, state, site.enter) if part.acts == "tensor" and site.enter else owner
        if part.acts == "tensor":
            owner.owned.setdefault(site.tensor, []).append(part)
            part.owner = owner
        reader.parts.append(part)
        reader.batch_dim = site.batch_dim
        part.aliases = _aliases(model, site) if site.kind == "embedding" else []
        for alias in part.aliases:
            other = host_of(model, state, alias)
            if part.acts == "tensor":
                other.owned.setdefault(site.tensor, []).append(part)
            other.parts.append(part)
            touched.setdefault(alias, set()).add(HostMixin)
        touched.setdefault(owner.path, set()).add(HostMixin)
        touched.setdefault(reader.path, set()).add(HostMixin)
        if site.port in ("hidden", "kv"):
            part.cell = Cell()
            enter = host_of(model, state, site.enter)
            enter.captures.append((part, part.cell))
            touched.setdefault(enter.path, set()).add(HostMixin)
        if site.port == "kv" and owner.attention is None:
            from .attention import VIA

            owner.attention = VIA[site.via](module)
        if site.port == "embed":
            owner.signature = signature_of(module)
            enter = site.enter
            owner.embedding = lambda p=enter: module_at(model, p)
            part.visible = False
            other = _decoder_of(model, site)
            if other is not None:
                part.visible = True
                reads = host_of(model, state, other)
                reads.signature = signature_of(module_at(model, other))
                reads.memory_parts.append(part)
                touched.setdefault(other, set()).add(HostMixin)
        _no_fast_path(model, state, site.path)
    if varying or any(p.acts == "embed" for p in record.parts):
        frame_hosts(model, state, touched, layers)
    for path, kinds in touched.items():
        exchange(model, state, path, kinds)


def _aliases(model: nn.Module, site: Site) -> list[str]:
    """Other modules of the same class that hold the very same table, as an encoder's and a decoder's embedding do."""
    module = module_at(model, site.path)
    table, cls = module._parameters.get(site.tensor or "weight"), getattr(module, "num_embeddings", None)
    return [
        p for p, m in model.named_modules()
        if m is not module and getattr(m, "num_embeddings", None) == cls and m._parameters.get(site.tensor or "weight") is table
    ]  # fmt: skip


def frame_hosts(model: nn.Module, state: State, touched: dict[str, set[type]], layers: set[str]) -> None:
    """Towers note their mask; layers that may be checkpointed carry it along."""
    for path, module in model.named_modules():
        if KEY in path.split("."):
            continue
        parts = path.split(".")
        if not any(p.isdigit() for p in parts):
            if path == "" or "attention_mask" in signature_of(module).parameters:
                host_of(model, state, path).signature = signature_of(module)
                touched.setdefault(path, set()).add(FrameMixin)
        elif path in layers:
            host_of(model, state, path)
            touched.setdefault(path, set()).add(LayerMixin)


def _layer_paths(model: nn.Module) -> set[str]:
    return {p for p, m in model.named_modules() if hasattr(m, "gradient_checkpointing") and p.split(".")[-1].isdigit()}


def _decoder_of(model: nn.Module, site: Site) -> str | None:
    """The tower that attends to what the tower of `site` returns, if there is one."""
    if site.tower != "encoder":
        return None
    for path, module in model.named_modules():
        if path.split(".")[-1] == "decoder" and "encoder_attention_mask" in signature_of(module).parameters:
            return path
    return None


def _no_fast_path(model: nn.Module, state: State, path: str) -> None:
    """nn.TransformerEncoderLayer's inference path reads its children's weights and calls none of them: switch it off
    in layers that have parts."""
    names = path.split(".")
    for i in range(len(names) + 1):
        module = module_at(model, ".".join(names[:i]))
        own = module.__dict__.get("activation_relu_or_gelu")
        if own:
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
            state.undo.append(lambda m=module, v=own: setattr(m, "activation_relu_or_gelu", v))


ORDER = (LayerMixin, FrameMixin, HostMixin)


def exchange(model: nn.Module, state: State, path: str, kinds: set[type]) -> None:
    """Give the module at `path` the generated class that its parts need."""
    host, module = host_of(model, state, path), module_at(model, path)
    host.mixins |= kinds
    module.__dict__["_veneer_host"] = host
    tensors = tuple(sorted(t for t, parts in host.owned.items() if parts))
    module.__class__ = subclass(host.original, tuple(k for k in ORDER if k in host.mixins), tensors)


def uninstall(model: nn.Module, state: State, record: Any) -> None:
    """Take the parts of `record` off, and give hosts without parts their own class back."""
    mine = {id(p) for p in record.parts}
    for path, host in list(state.hosts.items()):
        module = module_at(model, path)
        host.parts = [p for p in host.parts if id(p) not in mine]
        host.memory_parts = [p for p in host.memory_parts if id(p) not in mine]
        host.captures = [(p, c) for p, c in host.captures if id(p) not in mine]
        host.owned = {t: kept for t, ps in host.owned.items() if (kept := [p for p in ps if id(p) not in mine])}
        box = module._modules.get(KEY)
        if box is not None:
            box._modules.pop(f"@{record.name}", None)
            if not box._modules:
                del module._modules[KEY]
        if host.attention is not None and not any(p.acts == "kv" for p in host.parts):
            host.attention.undo(module)
            host.attention = None
        if "_veneer_host" in module.__dict__:
            exchange(model, state, path, set())


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
