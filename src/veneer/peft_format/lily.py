"""LILY: every module's tensors hold what it shares with others, and the names of its targets say with which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CapabilityError
from ..methods import Lily
from .config import Source
from .places import short_names, sites_at
from .table import Form, Made, Place, Tensors


def names(site: Any, stride: int) -> tuple[str, str]:
    return Lily(stride=stride).names(site)


def ready(source: Source, found: dict[str, Tensors]) -> None:
    """Where the file shares an A in another way than vn.Lily does, each map gets its own: the same function, and trained on
    here the copies go their own ways."""
    stride = source.whole("stride_A", 1)
    seen: dict[str, Tensor] = {}
    for path, tensors in found.items():
        a, b = names(sites_at(source, path, "weight")[0], stride)
        for name, key in ((a, "A"), (b, "B")):
            if key not in tensors:
                continue  # refused when the module is read
            if torch.equal(seen.setdefault(name, tensors[key]), tensors[key]):
                continue
            if key == "B":
                what = f"target_modules={source.config.get('target_modules')!r} gives {path!r} a B that is not its kind's"
                raise source.fail(what, "Name the kinds of modules in target_modules, and not single ones; or use it with PEFT")
            source.config["stride_A"] = 1


def read(p: Place) -> Tensors:
    a, b = names(p.site, p.whole("stride_A", 1))
    p.roots[a] = p.tensors["A"]
    p.roots[b] = p.tensors["B"].unflatten(0, (p.whole("num_B", 2), -1))
    return {"R": p.tensors["R"]}


def write(m: Made) -> Tensors:
    a, b = m.part.shared()
    return {"R": m.tensors["R"], "A": a.detach(), "B": b.detach().flatten(0, 1)}


def fields(m: Made) -> dict[str, Any]:
    if m.method.per != "batch":
        raise CapabilityError("PEFT's LILY routes all tokens of a batch alike, and here each has its own way", fix="Train it as vn.Lily(per='batch')")
    return {"r": m.method.r, "num_B": m.method.experts, "stride_A": m.method.stride, "scaling": m.method.scale}


def targets(made: list[Made]) -> dict[str, Any]:
    """Names under which PEFT shares nothing that is not the same here: kinds where they can be, else each module alone."""
    short = short_names(made[0].model, [m.site.path for m in made])
    paths = sorted(m.site.path for m in made)
    for chosen, stride in ((short, made[0].method.stride), (short, 1)):
        if isinstance(chosen, list) and fits(made, chosen, stride):
            return {"target_modules": chosen, "stride_A": stride}
    return {"target_modules": paths, "stride_A": 1}


def fits(made: list[Made], chosen: list[str], stride: int) -> bool:
    """Whether modules that PEFT takes for one kind, by the end of their paths and their shape, share alike here."""
    of = {m.site.path: m for m in made}
    kinds: dict[Any, list[Made]] = {}
    for path in (p for p, _ in made[0].model.named_modules() if p in of):
        ends = [c for c in chosen if path.endswith(c)]
        if len(ends) != 1:
            return False
        kinds.setdefault((ends[0], of[path].site.out, of[path].site.inp), []).append(of[path])
    leader = {id(m): (kind[i // stride * stride], kind[0]) for kind in kinds.values() for i, m in enumerate(kind)}
    return all(m.part.names[0] == leader[id(m)][0].part.names[0] and m.part.names[1] == leader[id(m)][1].part.names[1] for m in made)


FORM = Form(
    "LILY", Lily, {"lily_A.weight": "A", "lily_B.weight": "B", "lily_router.weight": "R"},
    lambda p: {
        "r": p.whole("r", 32), "experts": p.whole("num_B", 2), "stride": p.whole("stride_A", 1), "scale": p.number("scaling", 1.0), "per": "batch"
    },
    fields, reads="r num_B stride_A scaling", enter=read, leave=write, overall=targets, ready=ready,
)  # fmt: skip
