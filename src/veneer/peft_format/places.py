"""Module paths, as PEFT's files name places, and sites, as plans do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ..errors import StoreError, did_you_mean
from ..methods.part import module_at
from ..patterns import select
from ..sites import Site
from .config import Source


def sites_at(source: Source, path: str, port: str) -> list[Site]:
    """The sites of `port` at the module `path`: one, or the slices of a fused map.

    Raises: StoreError where the model has no such module, or the module no such port.
    """
    found = source.by_path.get((port, path))
    if found:
        return found
    paths = [p for q, p in source.by_path if q == port]
    try:
        module = module_at(source.model, path)
    except AttributeError:
        raise source.fail(f"the adapter is for another base: there is no module {path!r} here", did_you_mean(path, paths)) from None
    # a module that is used at several places stands at the first
    same = next((p for p in paths if module_at(source.model, p) is module), None)
    if same is None:
        raise source.fail(f"{path!r} is a {type(module).__name__}, which has no {port} to adapt here", did_you_mean(path, paths))
    return source.by_path[port, same]


def pattern(sites: Iterable[Site], wanted: list[Site], where: str = "") -> str:
    """A pattern that takes exactly `wanted`: roles where they are whole, else roles with layers, else module paths.

    Raises: StoreError where no pattern does.
    """
    port = wanted[0].port
    here = [s for s in sites if s.port == port]
    members: list[str] = []
    loose: list[str] = []
    for role in dict.fromkeys(s.role for s in wanted):
        mine = [s for s in wanted if s.role == role]
        for group in _spellings(role, mine):
            if set(select(here, ",".join(group), port=port)) == set(mine):
                members += group
                break
        else:
            loose += [s.path for s in mine]
    out = ",".join([*members, _named(loose)] if loose else members)  # a regular expression takes the rest of the pattern
    if set(select(here, out, port=port)) == set(wanted):
        return out
    roles = ",".join(dict.fromkeys(s.role for s in wanted if s.role))
    paths = {s.path for s in wanted}
    extra = [s.path for s in select(here, roles, port=port) if s.path not in paths] if roles else []
    out = f"{roles},!{_named(extra)}" if extra else roles
    if not roles or set(select(here, out, port=port)) != set(wanted):
        raise StoreError(f"no pattern names {wanted[0].path!r} alone", where=where, fix="Adapt every projection that is stored there, or none")
    return out


def _named(paths: list[str]) -> str:
    return "name:(" + "|".join(re.escape(p) for p in dict.fromkeys(paths)) + ")"


def _spellings(role: str, mine: list[Site]) -> Iterable[list[str]]:
    """Ways to write `mine`, all of one role, the shortest first."""
    if not role:
        return
    yield [role]
    towers = list(dict.fromkeys(s.tower for s in mine))
    heads = [f"{t}/{role}" if t else role for t in towers]
    yield heads
    if all(s.layer is not None for s in mine):
        layers = [dict.fromkeys(s.layer for s in mine if s.tower == t) for t in towers]
        yield [f"{h}@{{{','.join(map(str, n))}}}" for h, n in zip(heads, layers, strict=True)]


def short_names(model: nn.Module, paths: Iterable[str], *, dotted: bool = True) -> list[str] | str:
    """`paths` as PEFT's target_modules: the shortest tails that no other module has, or else one regular expression.

    With `dotted` a tail starts at a dot, else anywhere (so that 'norm' is one of 'input_layernorm').
    """
    wanted = set(paths)
    everything = [p for p, _ in model.named_modules() if p and "_veneer" not in p]
    by_leaf: dict[str, list[str]] = {}
    for p in everything:
        by_leaf.setdefault(p.rpartition(".")[2], []).append(p)

    def ends(path: str, tail: str) -> bool:
        return path == tail or path.endswith("." + tail if dotted else tail)

    out: dict[str, None] = {}
    others: dict[str, list[str]] = {}
    for path in sorted(wanted):
        parts = path.split(".")
        if parts[-1] not in others:
            leaves = [parts[-1]] if dotted else [leaf for leaf in by_leaf if leaf.endswith(parts[-1])]
            others[parts[-1]] = [p for leaf in leaves for p in by_leaf[leaf] if p not in wanted]
        rivals = others[parts[-1]]
        for i in range(len(parts) - 1, -1, -1):
            tail = ".".join(parts[i:])
            if not any(ends(r, tail) for r in rivals):
                out[tail] = None
                break
        else:
            return "|".join(re.escape(p) for p in sorted(wanted))
    return sorted(out)
