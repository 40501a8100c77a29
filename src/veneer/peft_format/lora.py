"""LORA: A and B under each module, and DoRA's m; whole fused maps as slices that share A; expert tensors stacked."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..errors import CapabilityError
from ..methods import DoRA, LoRA
from ..ops.maps import place, take
from ..sites import Site
from . import biases
from .config import Draft, Source, check_start
from .places import pattern, short_names, sites_at

KIN = ("lora-xs", "moslora", "tied-lora", "loretta")
FIELDS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_parameters")
_KEY = re.compile(r"(?P<path>.+?)(?P<inner>(?:\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_LENGTHS = ".lora_magnitude_vector"


def read(source: Source) -> list[Draft]:
    """The plan of a LORA file: one LoRA for each rank and alpha. Takes its tensors out of `source`."""
    check_start(source)
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key in list(source.tensors):
        match = _KEY.fullmatch(key)
        if match is not None:
            place_ = match["path"], match["inner"].count(".base_layer")
            found.setdefault(place_, {})[match["side"]] = source.tensors.pop(key)
    dora = source.flag("use_dora")
    lengths = {key: source.tensors.pop(key).flatten() for key in list(source.tensors) if dora and key.endswith(_LENGTHS)}
    groups: dict[tuple[int, float], Draft] = {}
    wanted: dict[tuple[int, float], list[Site]] = {}
    for (path, depth), pair in found.items():
        if set(pair) != {"A", "B"}:
            raise source.fail(f"{path!r} has lora_{min(pair)} alone", "The file is not whole; take another copy")
        sites = sites_at(source, path, "weight")
        tensor = _parameter(source, path, depth, found)
        sites = [s for s in sites if tensor is None or s.tensor == tensor]
        if not sites:
            raise source.fail(f"{path!r} has no weight {tensor!r} here")
        a, b, rank = _canonical(source, path, sites, pair["A"], pair["B"])
        alpha = _alpha(source, path, tensor, rank)
        group = groups.setdefault((rank, alpha), Draft(LoRA(1)))
        for s in sites:
            # slices of a fused map see the same x: each takes A whole, and its own rows of B
            group.values[s] = {"A": a, "B": take(b, s.slice, -2)}
            if dora:
                group.values[s]["m"] = _length(source, path, s, b, lengths)
            wanted.setdefault((rank, alpha), []).append(s)
    for (rank, alpha), draft in groups.items():
        at = pattern(source.sites, wanted[rank, alpha], source.where)
        draft.method = (DoRA if dora else LoRA)(rank, alpha=int(alpha) if alpha == int(alpha) else alpha, dropout=source.number("lora_dropout", 0.0), at=at)
    return [*groups.values(), *biases.read(source)]


def _parameter(source: Source, path: str, depth: int, found: dict[tuple[str, int], Any]) -> str | None:
    """Which parameter of an expert module the wrapper at `depth` adapts; PEFT nests them in the module's own order."""
    listed = source.names("target_parameters")
    depths = [d for d in range(9, -1, -1) if (path, d) in found]
    own = source.model.get_submodule(path)._parameters
    names = [n for n in own if any(f"{path}.{n}" == t or f"{path}.{n}".endswith(f".{t}") for t in listed)]
    if not names and depths == [0]:
        return None
    if len(names) != len(depths):
        raise source.fail(f"{path!r} has tensors for {len(depths)} parameters, and target_parameters names {len(names)} there: {names}")
    if depth not in depths:
        raise source.fail(f"{path!r} is wrapped {depth} times")
    return names[depths.index(depth)]


def _canonical(source: Source, path: str, sites: list[Site], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """A (r, in) and B (out, r), or with experts in front, and the rank, from the file's layout."""
    s = sites[0]
    out = s.slice.groups * s.slice.stride if s.slice is not None else s.out
    if s.experts:
        rank = a.shape[0] // s.experts if a.dim() else 0
        if not rank or tuple(a.shape) != (rank * s.experts, s.inp) or tuple(b.shape) != (out, rank * s.experts):
            raise _misfit(source, path, a, b, f"{s.experts} experts of {out} x {s.inp}")
        return a.reshape(s.experts, rank, s.inp), b.reshape(out, rank, s.experts).permute(2, 0, 1), rank
    a, b = (t.flatten(1) if t.dim() > 1 else t.reshape(1, -1) for t in (a, b))
    rank = a.shape[0]
    if not rank or a.shape[1] != s.inp or tuple(b.shape) != (out, rank):
        raise _misfit(source, path, a, b, f"{out} x {s.inp}")
    return a, b, rank


def _length(source: Source, path: str, site: Site, b: Tensor, lengths: dict[str, Tensor]) -> Tensor:
    m = lengths.get(path + _LENGTHS)
    if m is None or m.shape[0] != b.shape[-2]:
        there = "none" if m is None else f"one of {m.shape[0]} numbers"
        raise source.fail(f"use_dora is set, and {path!r} needs a lora_magnitude_vector of {b.shape[-2]}; the file has {there}", "Take another copy")
    return take(m, site.slice, 0)


def _misfit(source: Source, path: str, a: Tensor, b: Tensor, needed: str) -> Exception:
    return source.fail(f"A {list(a.shape)} and B {list(b.shape)} do not fit {path!r}, which is {needed}", "The adapter is for another base")


def _alpha(source: Source, path: str, tensor: str | None, rank: int) -> float:
    """The alpha that gives the file's scale as alpha / r."""
    name = f"{path}.{tensor}" if tensor else path

    def of(table: str, plain: float) -> float:
        for key, value in source.table(table).items():
            source.regex(table, key)
            if re.match(rf"(.*\.)?({key})$", name):
                return source.finite(f"{table}[{key!r}]", value)
        return plain

    said = of("rank_pattern", source.whole("r", 8))
    if said != rank:
        raise source.fail(f"{path!r} has rank {rank} in the weights and {said} in the configuration", "The two files do not belong together")
    alpha = of("alpha_pattern", source.number("lora_alpha", 8))
    return alpha * math.sqrt(rank) if source.flag("use_rslora") else alpha


# -- writing ----------------------------------------------------------------------------------------------------------
def write(model: Any, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a LORA file, for LoRA or DoRA parts and BitFit parts beside them. Several LoRAs on one map
    become one of their summed rank; LoRA's kin of which PEFT has no type give the A and B that they come to."""
    groups: dict[tuple[str, str], list[Any]] = {}
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    targets: list[str] = []
    parameters: dict[str, list[str]] = {}
    transposed = False
    bias = [p for p in parts if p.method_name == "bitfit"]
    parts = [p for p in parts if p.method_name != "bitfit" and p.acts]
    for p in parts:
        groups.setdefault((p.site.path, p.site.tensor), []).append(p)
    for (path, tensor), members in groups.items():
        site = members[0].site
        if site.kind == "tensor" or (site.kind == "conv" and members[0].map.groups > 1):
            raise CapabilityError(f"PEFT's LORA cannot express LoRA at {path}.{tensor}", fix="Save it in the native format: vn.save(model, path)")
        a, b, alpha = _joined(members)
        if site.kind == "experts":
            parameters.setdefault(path, []).append(tensor)
            key = f"{path}:{tensor}"
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            rank = a.shape[0] // site.experts
        else:
            targets.append(path)
            key, rank = path, a.shape[0]
            if site.kind == "conv":
                kernel = members[0].map.kernel
                a, b = a.reshape(rank, -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
        sizes[key] = rank, alpha
        transposed = transposed or site.kind == "transposed"
        stem, tail = ("lora_embedding_", "") if site.kind == "embedding" else ("lora_", ".weight")
        tensors[f"{key}.{stem}A{tail}"], tensors[f"{key}.{stem}B{tail}"] = a, b
        if hasattr(members[0], "m"):
            tensors[path + _LENGTHS] = _lengths(path, members)
    tensors = _nest(model, tensors, parameters)
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    odd = {k: v for k, v in sizes.items() if v != (rank, alpha)}
    names = {f"{p}.{t}" for p, ts in parameters.items() for t in ts}
    fields: dict[str, Any] = {
        "r": rank, "lora_alpha": _plain(alpha), "lora_dropout": parts[0].dropout, "bias": "none", "fan_in_fan_out": transposed,
        "use_rslora": False, "use_dora": hasattr(parts[0], "m"), "init_lora_weights": True, "target_modules": short_names(model, targets) if targets else [],
        "rank_pattern": {_exactly(k): r for k, (r, _) in odd.items() if r != rank},
        "alpha_pattern": {_exactly(k): _plain(x) for k, (_, x) in odd.items() if x != alpha},
        "target_parameters": sorted(names) or None,
    }  # fmt: skip
    if bias:
        more, whole = biases.write(model, bias, set(targets))
        return {**fields, **more}, {**tensors, **whole}
    return fields, tensors


def _joined(members: list[Any]) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of the one LoRA over the whole map that equals `members` together."""
    slices = [p.site.slice for p in members]
    pairs = [[t.detach() for t in p.pair()] for p in members]
    (down, _), scale = pairs[0], members[0].scale
    same = len(members) == 1 or all(torch.equal(a, down) and p.scale == scale for p, (a, _) in zip(members, pairs, strict=True))
    if same and len(set(slices)) == len(members):  # one LoRA, or what a whole fused map was read into
        ups = [place(b, s, -2) for (_, b), s in zip(pairs, slices, strict=True)]
        return down, sum(ups[1:], ups[0]), scale * down.shape[-2]
    a = torch.cat([a for a, _ in pairs], -2)
    b = torch.cat([place(b * p.scale, p.site.slice, -2) for p, (_, b) in zip(members, pairs, strict=True)], -1)
    return a, b, float(a.shape[-2])


def _lengths(path: str, members: list[Any]) -> Tensor:
    """m of a whole map, from its DoRA or from those of all its slices."""
    covered = sum(place(torch.ones_like(p.m), p.site.slice, 0) for p in members)
    if members[0].site.experts or not bool((covered == 1).all()):  # type: ignore[union-attr]
        raise CapabilityError(f"PEFT's DoRA is one for the whole of a matrix, and at {path!r} it is not", fix="Save it in the native format")
    m = sum(place(p.m.detach(), p.site.slice, 0) for p in members)
    return m.reshape(1, -1, *[1] * len(members[0].map.kernel)) if members[0].site.kind == "conv" else m  # type: ignore[union-attr]


def _nest(model: Any, tensors: dict[str, Tensor], parameters: dict[str, list[str]]) -> dict[str, Tensor]:
    """Keys of expert tensors: the module's first parameter lies innermost."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, colon, rest = key.partition(":")
        if colon:
            tensor, _, tail = rest.partition(".")
            order = [n for n in model.get_submodule(path)._parameters if n in parameters[path]]
            path += ".base_layer" * (len(order) - 1 - order.index(tensor))
            key = f"{path}.{tail}"
        out[key] = value
    return out


def _exactly(key: str) -> str:
    """A pattern for the module, or the parameter of experts, at `key` alone."""
    return "^" + re.escape(key.replace(":", "."))


def _plain(x: float) -> float | int:
    return int(x) if x == int(x) else x
