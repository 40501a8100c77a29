"""LORA with bias='all' or 'lora_only': PEFT trains the base's biases in place and stores them whole; here they are BitFit."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..errors import CapabilityError
from ..methods import BitFit
from ..methods.part import module_at
from ..sites import Site
from .config import Draft, Source
from .places import pattern, sites_at

KINDS = ("none", "all", "lora_only")
_KEY = re.compile(r"(?P<path>.+?)(?:\.base_layer)?\.bias")
_COPIES = re.compile(r"\.(original_module|modules_to_save)\.bias$")


def read(source: Source) -> list[Draft]:
    """BitFit with the difference between the file's biases and the base's. Takes the biases out of `source`."""
    kind = source.config.get("bias", "none")
    if kind not in KINDS:
        raise source.fail(f"bias={kind!r} is none of {', '.join(map(repr, KINDS))}")
    if kind == "none":
        return []
    for key in list(source.tensors):  # a saved module stands there a second time, and once more as it was before
        if _COPIES.search(key) and _COPIES.sub(".bias", key) in source.tensors:
            source.tensors.pop(key)
    saved = source.names("modules_to_save")
    values: dict[Site, dict[str, Tensor]] = {}
    wanted: list[Site] = []
    for key in list(source.tensors):
        match = _KEY.fullmatch(key)
        if match is None or f"{match['path']}.weight" in source.tensors or any(match["path"].endswith(n) for n in saved):
            continue  # of a whole module
        value, path = source.tensors.pop(key), match["path"]
        sites = sites_at(source, path, "param")
        site = next((s for s in sites if s.tensor == "bias"), None)
        if site is None or site.shape != tuple(value.shape):
            raise source.fail(f"{path!r} has no bias of shape {list(value.shape)}", "The adapter is for another base")
        own = module_at(source.model, path)._parameters["bias"]
        assert own is not None
        if own.is_meta:
            raise source.fail("biases are stored whole, and the base has no numbers here to take them from", "Load on a base with its weights")
        delta = value.to(own.device, own.dtype if own.dtype.itemsize > 2 else value.dtype) - own.detach()
        if bool(delta.any()):
            values[site] = {"delta": delta}
            wanted += sites
    return [Draft(BitFit(at=pattern(source.sites, wanted, source.where)), values)] if wanted else []


def write(model: Any, parts: list[Any], lora: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The field `bias` and the biases themselves, for BitFit parts beside LoRA at the modules `lora`."""
    tensors: dict[str, Tensor] = {}
    if model.__dict__["_veneer_state"].merged is not None:
        raise CapabilityError("PEFT stores biases whole, and adapters are merged into these", fix="vn.unmerge(model) first")
    for p in parts:
        own = module_at(model, p.site.path)._parameters[p.site.tensor]
        if p.site.tensor != "bias" or not p.site.path:
            raise CapabilityError(f"PEFT's LORA stores biases called 'bias', not {p.site.path}.{p.site.tensor}", fix="Save it in the native format")
        inner = ".base_layer" if p.site.path in lora else ""
        tensors[f"{p.site.path}{inner}.bias"] = own.detach() + p.delta.detach()
    return {"bias": "all"}, tensors
