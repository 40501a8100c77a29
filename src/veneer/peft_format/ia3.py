"""IA3: one vector under each module, on its output, or, for feed-forward modules, on its input."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..errors import CapabilityError
from ..methods import IA3
from ..ops.maps import place, take
from ..sites import Site
from .config import Draft, Source
from .places import pattern, short_names, sites_at

FIELDS = ("feedforward_modules", "fan_in_fan_out")
_KEY = re.compile(r"(?P<path>.+)\.ia3_l")


def read(source: Source) -> list[Draft]:
    """The plan of an IA3 file: one IA3 on outputs, one on inputs. Takes its tensors out of `source`."""
    inner = source.names("feedforward_modules")
    whole = source.regex("feedforward_modules", inner[0]) if inner and isinstance(source.config["feedforward_modules"], str) else None
    drafts = {on: Draft(IA3(on=on)) for on in ("output", "input")}
    for key in list(source.tensors):
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        path, value = match["path"], source.tensors.pop(key)
        sites = sites_at(source, path, "weight")
        inward = whole is not None and whole.fullmatch(path) is not None or any(path == m or path.endswith("." + m) for m in inner)
        s = sites[0]
        if s.experts or s.kind in ("embedding", "tensor"):
            raise source.fail(f"{path!r} is not a map that IA3 rescales")
        width = s.inp if inward else s.slice.groups * s.slice.stride if s.slice is not None else s.out
        if s.kind == "conv" and inward:
            module = source.model.get_submodule(path)
            width = module.in_channels  # type: ignore[assignment]
        if value.numel() != width or max(value.shape, default=0) != width:
            side = "input" if inward else "output"
            raise source.fail(f"a vector of shape {list(value.shape)} does not fit the {side} of {path!r}, which has {width} channels")
        v = value.reshape(-1)
        for s in sites:
            drafts["input" if inward else "output"].values[s] = {"l": v if inward else take(v, s.slice, 0)}
    out = []
    for on, draft in drafts.items():
        if draft.values:
            draft.method = IA3(on=on, at=pattern(source.sites, list(draft.values), source.where))
            out.append(draft)
    return out


def write(model: Any, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of an IA3 file."""
    tensors: dict[str, Tensor] = {}
    sides: dict[str, str] = {}
    transposed = False
    for p in parts:
        site: Site = p.site
        if p.acts == "tensor" or site.kind == "embedding":
            raise CapabilityError(f"PEFT's IA3 cannot rescale {site.path}.{site.tensor}", fix="Save it in the native format: vn.save(model, path)")
        if sides.setdefault(site.path, p.acts) != p.acts or (f"{site.path}.ia3_l" in tensors and site.slice is None):
            raise CapabilityError(f"PEFT's IA3 has one vector a module, and {site.path} has several", fix="Save it in the native format")
        transposed = transposed or site.kind == "transposed"
        inward = p.acts == "input"
        key = f"{site.path}.ia3_l"
        v = p.l.detach() - 1
        if not inward:
            v = place(v, site.slice, 0)
        before = tensors.get(key)
        tensors[key] = v if before is None else before + v  # slices of a fused map do not overlap
    for key, v in tensors.items():
        path = key.removesuffix(".ia3_l")
        shape = [1, -1] if sides[path] == "input" else [-1, 1]
        if hasattr(model.get_submodule(path), "kernel_size"):
            shape = [1, -1, *[1] * len(model.get_submodule(path).kernel_size)]
        tensors[key] = (v + 1).reshape(shape).clone() if torch.is_tensor(v) else v
    inner = [p for p, acts in sides.items() if acts == "input"]
    targets, feed = short_names(model, sides), short_names(model, inner) if inner else []
    if isinstance(targets, str) != isinstance(feed, str):  # PEFT wants both of one kind
        targets, feed = ("|".join(re.escape(p) for p in sorted(s)) if s else "" for s in (list(sides), inner))
    elif isinstance(targets, list):
        # a tail that is both would make outputs inputs; and inputs must be among the targets as they are spelt
        targets = sorted({*targets, *feed})
    return {"target_modules": targets, "feedforward_modules": feed, "fan_in_fan_out": transposed, "init_ia3_weights": True}, tensors
