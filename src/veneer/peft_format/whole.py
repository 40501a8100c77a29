"""Tensors that are trained themselves: LN_TUNING, and what every type may add as modules_to_save."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..errors import CapabilityError
from ..methods import Full
from .config import Draft, Source
from .places import pattern, short_names, sites_at

FIELDS = ()
_KEY = re.compile(r"(?P<path>.+)\.ln_tuning_layers\.(?P<tensor>[^.]+)")


def read(source: Source) -> list[Draft]:
    """The plan of an LN_TUNING file: vn.Full on its norms. Takes its tensors out of `source`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in list(source.tensors):
        match = _KEY.fullmatch(key)
        if match is not None:
            found.setdefault(match["path"], {})[match["tensor"]] = source.tensors.pop(key)
    return _full(source, found)


def rest(source: Source) -> list[Draft]:
    """What no codec took: the whole tensors of modules_to_save, and copies of an embedding that PEFT adds of its own."""
    found: dict[str, dict[str, Tensor]] = {}
    names = source.names("modules_to_save")
    own = dict(source.model.named_parameters(remove_duplicate=False))
    for key in list(source.tensors):
        path, _, tensor = key.rpartition(".")
        base = path.removesuffix(".base_layer")
        value = own.get(f"{base}.{tensor}")
        if value is not None and value.shape == source.tensors[key].shape and not value.is_meta and bool((value == source.tensors[key].to(value)).all()):
            source.tensors.pop(key)  # the base's own
        elif base != path or any(above.endswith(n) for n in names for above in _above(path)):
            found.setdefault(base, {})[tensor] = source.tensors.pop(key)
    return _full(source, found)


def _above(path: str) -> list[str]:
    """`path` and the modules it lies in; PEFT copies those whose path ends in a name of modules_to_save."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _full(source: Source, found: dict[str, dict[str, Tensor]]) -> list[Draft]:
    if not found:
        return []
    values = {}
    for path, tensors in found.items():
        sites = sites_at(source, path, "param")
        own = {s.tensor: s for s in sites}
        for name, value in tensors.items():
            if name not in own:
                raise source.fail(f"{path!r} has no parameter {name!r}")
            if tuple(value.shape) != own[name].shape:
                raise source.fail(
                    f"{path}.{name} has shape {list(value.shape)} there and {list(own[name].shape)} here",
                    "The adapter is for another base, or the embeddings were resized: model.resize_token_embeddings(n)",
                )
        for name, site in own.items():
            if name not in tensors:
                # one that equals the base's was taken out above: the copy is then the base's own
                tensors[name] = source.model.get_submodule(path)._parameters[name].detach()  # type: ignore[union-attr]
            values[site] = {"tensor": tensors[name]}
    return [Draft(Full(at=pattern(source.sites, list(values), source.where)), values)]


def write(model: nn.Module, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of an LN_TUNING file, for vn.Full on norms; other modules go to modules_to_save."""
    norms = [p for p in parts if p.site.role == "norm"]
    if not norms:
        raise CapabilityError(
            "PEFT has no adapter that is only whole tensors, unless of norms",
            fix="Save it in the native format, or put a method beside it: vn.LoRA(8) + vn.Full(at='head')",
        )
    tensors = {f"{p.site.path}.ln_tuning_layers.{p.site.tensor}": p.tensor.detach() for p in norms}
    return {"target_modules": short_names(model, {p.site.path for p in norms})}, tensors


def write_rest(model: nn.Module, parts: list[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """modules_to_save, and its tensors: the smallest set of modules that holds exactly those of `parts`."""
    tensors = {(f"{p.site.path}.{p.site.tensor}" if p.site.path else p.site.tensor): p.tensor.detach() for p in parts}
    modules: dict[str, None] = {}
    for p in parts:
        path = p.site.path
        if not path:
            raise CapabilityError(f"PEFT cannot save {p.site.tensor!r}, which is a parameter of the model itself", fix="Save it in the native format")
        names = path.split(".")
        best = path
        for i in range(len(names) - 1, 0, -1):
            above = ".".join(names[:i])
            own = [f"{above}.{n}" for n, _ in model.get_submodule(above).named_parameters() if "_veneer" not in n]
            if any(n not in tensors for n in own):
                break
            best = above
        modules[best] = None
    names = short_names(model, modules, dotted=False)
    if isinstance(names, str):
        raise CapabilityError(f"PEFT's modules_to_save cannot name {names} alone", fix="Save it in the native format: vn.save(model, path)")
    return {"modules_to_save": names}, tensors
