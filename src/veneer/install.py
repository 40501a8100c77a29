"""Installing: parts go to their hosts, hosts' classes are exchanged, and all of it is undone exactly."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import resolve
from .embed import signature_of
from .host import Host
from .methods.part import module_at
from .ops.weights import derivable, plain
from .recipe import Cell, Tap
from .shells import DerivedMixin, FrameMixin, HostMixin, LayerMixin, ProductMixin, SavingMixin, subclass
from .sites import Site
from .state import State
from .structure import base_modules
from .ties import Ties

KEY = "_veneer"


def host_of(model: nn.Module, state: State, path: str) -> Host:
    host = state.hosts.get(path)
    if host is None:
        host = state.hosts[path] = Host(path, module_at(model, path), state)
    return host


def install(model: nn.Module, state: State, record: Any) -> None:
    """Put the parts of `record` on their hosts and exchange the hosts' classes."""
    touched: dict[str, set[type]] = {}
    layers = layer_paths(model)
    ties = Ties(model)
    varying = any((p.gate is not None and p.gate.per != "constant") or p.places is not None for p in record.parts)
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
            if record.name in state.adapters:  # put back (settled, or not after all): the order of parameters stays that of attaching
                for key in [k for k in map("@{}".format, state.adapters) if k in box._modules]:
                    box._modules[key] = box._modules.pop(key)
        mine.append(part)
        part.train(module.training)
        if not part.acts:  # a bank
            continue
        owner = _put(model, state, part, touched)
        part.__dict__["echoes"] = ties.echoes(part)
        for echo in part.echoes:
            _put(model, state, echo, touched)
        if site.port in ("hidden", "kv") and part.acts != "input":
            part.cell = Cell()
            part.seen = [Tap() for _ in part.taps]
            for path, cell in ((part.enter or site.enter, part.cell), *zip(part.taps, part.seen, strict=True)):
                enter = host_of(model, state, path)
                enter.captures.append((part, cell))
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
    if not state.adapters:
        for path in opaque(model):
            touched.setdefault(path, set()).add(DerivedMixin)
    for path, kinds in touched.items():
        exchange(model, state, path, kinds)


def opaque(model: nn.Module) -> list[str]:
    """The packed linears that no gradient passes through, adapted or not: what lies below them must be reached too. Asked
    once for each sort of module."""
    known: dict[Any, bool] = {}
    out = []
    for s in resolve.sites(model):
        if s.port != "weight" or s.kind != "linear":
            continue
        module = module_at(model, s.path)
        p = module._parameters.get(s.tensor or "weight")
        if p is not None and (p.is_meta or (p.is_floating_point() and plain(p, s))):
            continue
        sort = type(module), None if p is None else type(p.data)
        if sort not in known:
            known[sort] = derivable(module, s.inp, p)
        if not known[sort]:
            out.append(s.path)
    return out


def _put(model: nn.Module, state: State, part: Any, touched: dict[str, set[type]]) -> Host:
    """Give `part` to the host at its site, and to the one that reads its tensor; return the first."""
    site = part.site
    owner = host_of(model, state, site.path)
    reader = host_of(model, state, site.enter) if part.acts == "tensor" and site.enter else owner
    if part.acts == "tensor":
        owner.owned.setdefault(site.tensor or "weight", []).append(part)
        part.owner = owner
    reader.parts.append(part)
    reader.batch_dim = site.batch_dim
    touched.setdefault(owner.path, set()).add(HostMixin)
    touched.setdefault(reader.path, set()).add(HostMixin)
    return owner


def frame_hosts(model: nn.Module, state: State, touched: dict[str, set[type]], layers: set[str]) -> None:
    """Towers note their mask; layers that may be checkpointed carry it along."""
    for path, module in base_modules(model):
        parts = path.split(".")
        if not any(p.isdigit() for p in parts):
            if path == "" or "attention_mask" in signature_of(module).parameters:
                host_of(model, state, path).signature = signature_of(module)
                touched.setdefault(path, set()).add(FrameMixin)
        elif path in layers:
            host_of(model, state, path)
            touched.setdefault(path, set()).add(LayerMixin)


def layer_paths(model: nn.Module) -> set[str]:
    return {p for p, m in base_modules(model) if hasattr(m, "gradient_checkpointing") and p.split(".")[-1].isdigit()}


def _decoder_of(model: nn.Module, site: Site) -> str | None:
    """The tower that attends to what the tower of `site` returns, if there is one."""
    if site.tower != "encoder":
        return None
    for path, module in base_modules(model):
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


ORDER = (LayerMixin, SavingMixin, FrameMixin, HostMixin, DerivedMixin, ProductMixin)


def exchange(model: nn.Module, state: State, path: str, kinds: set[type]) -> None:
    """Give the module at `path` the generated class that its parts need."""
    host, module = host_of(model, state, path), module_at(model, path)
    host.mixins |= kinds
    module.__dict__["_veneer_host"] = host
    tensors = tuple(sorted(t for t, parts in host.owned.items() if parts))
    module.__class__ = subclass(host.original, tuple(k for k in ORDER if k in host.mixins), tensors)


def uninstall(model: nn.Module, state: State, record: Any) -> None:
    """Take the parts of `record` off, and give hosts without parts their own class back."""
    mine = {id(p) for part in record.parts for p in (part, *part.echoes)}
    for path in {p.site.path for p in record.parts}:
        box = module_at(model, path)._modules.get(KEY)
        if box is not None:
            box._modules.pop(f"@{record.name}", None)
            if not box._modules:
                del module_at(model, path)._modules[KEY]
    for path, host in list(state.hosts.items()):
        module = module_at(model, path)
        host.parts = [p for p in host.parts if id(p) not in mine]
        host.memory_parts = [p for p in host.memory_parts if id(p) not in mine]
        host.captures = [(p, c) for p, c in host.captures if id(p) not in mine]
        host.owned = {t: kept for t, ps in host.owned.items() if (kept := [p for p in ps if id(p) not in mine])}
        if host.attention is not None and not any(p.acts == "kv" for p in host.parts):
            host.attention.undo(module)
            host.attention = None
        if "_veneer_host" in module.__dict__:
            exchange(model, state, path, set())
