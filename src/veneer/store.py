"""Native adapter files: `adapter.json` and `adapter-DIGEST.safetensors` in one folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Record, known
from .attach import check_free, check_name, join, state_of
from .build import make_parts
from .errors import CapabilityError, StoreError, did_you_mean
from .files import DAMAGED, digest, read_json, read_tensors, sweep, write_whole
from .fingerprint import check_form, compare, fingerprint, gathered
from .formats import find, reader
from .methods.base import Build
from .methods.part import like
from .plan import Plan

FORMAT, VERSION = "veneer", 1
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
OURS = re.compile(r"adapter-[0-9a-f]{12}\.safetensors")
KEYS = ("format", "version", "name", "plan", "tensors", "base", "weights", "sha256")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, format: str = "veneer") -> Path:
    """Save the adapter `name` (default: the only active one) in the folder `path`; return the path.

    format  'veneer' (all plans), or 'peft': Hugging Face PEFT's files, for what it can express

    Written beside and then renamed into place: whoever is killed, or has a full disk, leaves the old adapter or the new.
    Under FSDP2 every process must call this, each with its own `path`, since all of them gather the shards.
    Raises: AdapterError, StoreError, CapabilityError (what the format cannot express).
    """
    state = state_of(model)
    if name is None:
        if len(state.active) != 1:
            raise StoreError(f"{len(state.active)} adapters are active", fix="Name one: vn.save(model, path, name='mine')")
        name = state.active[0]
    record = state.adapters[known(state, name)]
    if format == "peft":
        if any(hasattr(t, "full_tensor") for t in tensors_of(model, record, fold=False).values()):
            raise CapabilityError(
                "the adapter is sharded by FSDP2, and PEFT's files are made from whole tensors",
                fix="Save with format='veneer', load that on a plain model and save it from there",
            )
        from .peft_format import save_peft

        return save_peft(model, Path(path), record)
    if format != "veneer":
        raise StoreError(f"there is no format {format!r}", fix=did_you_mean(str(format), ("veneer", "peft")))
    tensors = {k: gathered(v.detach()).contiguous().cpu() for k, v in tensors_of(model, record, fold=True).items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "plan": record.plan.to_dict(),
        "tensors": listing(tensors),
        "base": fingerprint(model, replaced(record)),
    }
    write_folder(Path(path), config, tensors)
    return Path(path)


def listing(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()}


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], names: tuple[str, str] = (CONFIG, WEIGHTS)) -> None:
    """Weights first, then the configuration that names their digest; each written aside and renamed."""
    from safetensors.torch import save as to_bytes

    data = to_bytes(tensors, metadata={"format": "pt"})
    weights = names[1]
    if names == (CONFIG, WEIGHTS):
        # the configuration names its weights file, so a kill between the two renames leaves the old pair whole
        sha256 = digest(data)
        weights = f"adapter-{sha256[:12]}.safetensors"
        config = {**config, "weights": weights, "sha256": sha256}
    write_whole(path / weights, data)
    write_whole(path / names[0], (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode())
    if names == (CONFIG, WEIGHTS):
        sweep(path, {weights}, OURS)


def tensors_of(model: nn.Module, record: Record, fold: bool) -> dict[str, Tensor]:
    """The adapter's tensors by name: '<module path>:<method>.<number>.<tensor>'; shared ones once.

    With `fold`, what a part folds away on save (a prefix's MLP) is replaced by its result.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, part in named_parts(record):
        for tensor, value in part.tensors(fold).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            out[f"{prefix}.{tensor}"] = value
    return out


def named_parts(record: Record) -> list[tuple[str, Any]]:
    """Each part with its name, '<module path>:<method>.<number>'."""
    counts: dict[tuple[str, str], int] = {}
    out = []
    for part in record.parts:
        key = (part.site.path, part.method_name)
        number = counts[key] = counts.get(key, -1) + 1
        out.append((f"{part.site.path}:{part.method_name}.{number}", part))
    return out


def replaced(record: Record) -> set[str]:
    """Names of base tensors that the adapter replaces whole, so that the base's own do not matter."""
    return {f"{p.site.path}.{p.site.tensor}" if p.site.path else p.site.tensor for p in record.parts if getattr(p, "replaces", False)}


# -- loading ----------------------------------------------------------------------------------------------------------
def load(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, activate: bool = True, check_base: bool = True, head: bool = True
) -> Adapter:
    """Attach the adapter saved in the folder `path` as `name` (default: its own name): this
    library's, Hugging Face PEFT's or AdapterHub's.

    check_base  refuse a base of other shapes or other numbers (compared within what a cast to half precision changes)
    head        False: leave out what was trained whole (vn.Full), as the head of another task, which this model may not have

    The file's digest, the plan, the base and every tensor's name, shape and dtype are checked before anything is
    allocated or changed. Raises: StoreError for a missing, damaged, truncated or foreign file, or another base;
    PlanError, SiteError for a plan that is not one, or not for this model; AdapterError for a name that is taken.
    The model is then as it was.
    """
    path = Path(path)
    if not (path / CONFIG).exists():
        folder = find(path, name)
        if folder is not None:
            if not head:
                raise CapabilityError(
                    "only this library's own files can be read without their head", where=str(folder), fix="Load it whole, and save it with vn.save"
                )
            module, about = reader(folder)
            own = module.about(folder, about)[0] or ("default" if folder == path else folder.name)
            return module.load(model, folder, name or own, activate=activate)
    config = read_config(path)
    while True:
        try:
            tensors = read_tensors(path / config["weights"], config["sha256"])
            break
        except StoreError:  # unless someone saved there since the configuration was read
            again = read_config(path)
            if again == config:
                raise
            config = again
    where = str(path / CONFIG)
    if listing(tensors) != config["tensors"]:
        odd = next(k for k in {**config["tensors"], **tensors} if config["tensors"].get(k) != listing(tensors).get(k))
        raise StoreError(f"the tensor {odd!r} is not as listed", where=where, fix=DAMAGED)
    name = config["name"] if name is None else name
    check_name(name)
    check_free(model, name)
    plan = Plan.from_dict(config["plan"], where=where)
    if not head:
        plan, tensors, config["base"] = headless(plan, tensors, config["base"], model)
    record = Record(name, plan, make_parts(model, plan, blank=True))
    if check_base:
        compare(config["base"], model, where, replaced(record))
    fill(model, record, tensors, str(path / config["weights"]))
    return join(model, record, activate)


def headless(plan: Plan, tensors: dict[str, Tensor], base: dict[str, Any], model: nn.Module) -> tuple[Plan, dict[str, Tensor], dict[str, Any]]:
    """A saved plan, its tensors and the description of its base, without vn.Full and without what `model` does not have.
    Raises: StoreError where nothing is left."""

    def kept(p: Plan) -> Plan | None:
        inside = p.inside()
        if not inside:
            return None if any(m.holds == "tensor" for m in p.leaves()) else p
        rest = [k for k in map(kept, inside) if k is not None]
        return rest[0] if len(rest) == 1 < len(inside) else p.rebuild(rest) if rest else None

    rest = kept(plan)
    if rest is None:
        raise StoreError("there is nothing in this adapter but tensors that were trained whole", fix="Load it with its head")
    here = {n for n, _ in model.named_parameters()}
    base = {**base, **{k: {n: v for n, v in base[k].items() if n in here} for k in ("shapes", "samples")}}
    whole = [f":{m.name}." for m in plan.leaves() if m.holds == "tensor"]
    return rest, {k: v for k, v in tensors.items() if not any(w in k for w in whole)}, base


def read_config(path: Path) -> dict[str, Any]:
    """The checked contents of `adapter.json`."""
    config, where = read_json(path / CONFIG), str(path / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise StoreError("not an adapter of this library", where=where, fix="Give the folder that vn.save wrote")
    for key in config:
        if key not in KEYS:
            raise StoreError(f"unknown key {key!r}", where=where, fix=did_you_mean(key, KEYS))
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise StoreError(f"version {config.get('version')!r} is not {VERSION}", where=where, fix="Update the library")
    for key in KEYS:
        if key not in config:
            raise StoreError(f"the key {key!r} is missing", where=where, fix=DAMAGED)
    weights, sha256, tensors = config["weights"], config["sha256"], config["tensors"]
    if not isinstance(weights, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", weights):
        raise StoreError(f"{weights!r} is not the name of a safetensors file in this folder", where=where, fix=DAMAGED)
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise StoreError(f"{sha256!r} is not a SHA-256", where=where, fix=DAMAGED)
    if not isinstance(tensors, dict):
        raise StoreError("the list of tensors makes no sense", where=where, fix=DAMAGED)
    check_form(config["base"], where)
    return config


def fill(model: nn.Module, record: Record, tensors: dict[str, Tensor], where: str) -> None:
    """Give the parts of `record`, made blank, the saved tensors; every one must have its place, and every place its
    tensor. Takes their dtype, and their modules' devices."""
    unfold(record, tensors)
    own = tensors_of(model, record, fold=False)
    for key in own:
        if key not in tensors:
            raise StoreError(f"the tensor {key!r} is missing", where=where, fix="The file is not whole, or from another base")
    for key, value in tensors.items():
        if key not in own:
            raise StoreError(f"a tensor {key!r} that the plan does not have", where=where, fix=did_you_mean(key, own))
        if own[key].shape != value.shape:
            raise StoreError(f"{key!r} has shape {list(value.shape)}, and {list(own[key].shape)} is needed", where=where)
        if not isinstance(own[key], nn.Parameter) and own[key].dtype == value.dtype:
            continue
        if value.dtype not in DTYPES:
            raise StoreError(f"{key!r} is of type {str(value.dtype).removeprefix('torch.')}", where=where, fix="A parameter is a float of 16, 32 or 64 bits")
    filled: dict[int, Tensor] = {}
    names = {id(p): key for key, p in own.items()}
    for part in record.parts:
        device = like(Build(model), part.site)["device"]
        for module in part.modules():
            for store in (module._parameters, module._buffers):
                for key, p in store.items():
                    if p is not None and id(p) in names:
                        if id(p) not in filled:  # shared ones stay shared; the copy leaves the mapped file behind
                            new = tensors[names[id(p)]].to(device, copy=True)
                            filled[id(p)] = nn.Parameter(new, requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else new
                        store[key] = filled[id(p)]  # type: ignore[assignment]
    for prefix, part in named_parts(record):
        if flaw := part.flaw():
            raise StoreError(f"{prefix}: {flaw}", where=where, fix="The file is damaged; take another copy")
    for part in record.parts:
        part.derive()


def unfold(record: Record, tensors: dict[str, Tensor]) -> None:
    """Let every part take the form that its saved tensors have."""
    for prefix, part in named_parts(record):
        if not hasattr(part, "unfold"):
            continue
        saved = {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in part.state_dict().items()}:
            part.unfold(saved)
