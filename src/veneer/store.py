"""Native adapter files: `adapter.json` and `adapter.safetensors` in one folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Record, known
from .attach import attach, check_name, detach, state_of
from .errors import StoreError, VeneerError, did_you_mean
from .plan import Plan

FORMAT, VERSION = "veneer", 1
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
SAMPLES, EACH = 48, 8


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, format: str = "veneer") -> Path:
    """Save the adapter `name` (default: the only active one) in the folder `path`.

    format  'veneer' (all plans), or 'peft': Hugging Face PEFT's files, for what it can express

    Written beside and then renamed into place: whoever is killed leaves the old file or the new one.
    Raises: AdapterError, StoreError, CapabilityError (what the format cannot express).
    """
    state = state_of(model)
    if name is None:
        if len(state.active) != 1:
            raise StoreError(f"{len(state.active)} adapters are active", fix="Name one: vn.save(model, path, name='mine')")
        name = state.active[0]
    record = state.adapters[known(state, name)]
    if format == "peft":
        from .peft_format import save_peft

        return save_peft(model, Path(path), record)
    if format != "veneer":
        raise StoreError(f"there is no format {format!r}", fix=did_you_mean(str(format), ("veneer", "peft")))
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors_of(model, record, fold=True).items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "plan": record.plan.to_dict(),
        "tensors": {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()},
        "base": fingerprint(model, replaced(record)),
    }
    write_folder(Path(path), config, tensors)
    return Path(path)


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], names: tuple[str, str] = (CONFIG, WEIGHTS)) -> None:
    """Weights first, then the configuration that names their digest; each written aside and renamed."""
    from safetensors.torch import save as to_bytes

    data = to_bytes(tensors, metadata={"format": "pt"})
    path.mkdir(parents=True, exist_ok=True)
    weights = names[1]
    if names == (CONFIG, WEIGHTS):
        # the configuration names its weights file, so a kill between the two renames leaves the old pair whole
        weights = f"adapter-{digest(data)[:12]}.safetensors"
        config = {**config, "weights": weights, "sha256": digest(data)}
    write_whole(path / weights, data)
    write_whole(path / names[0], (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode())
    if names == (CONFIG, WEIGHTS):
        for old in path.glob("adapter-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError as e:
        raise StoreError(f"cannot write: {e.strerror or e}", where=str(path), fix=f"{shutil.disk_usage(path.parent).free >> 20} MiB are free there") from e
    finally:
        if os.path.exists(aside):
            os.unlink(aside)


def tensors_of(model: nn.Module, record: Record, fold: bool) -> dict[str, Tensor]:
    """The adapter's tensors by name: '<module path>:<method>.<number>.<tensor>'; shared ones once.

    With `fold`, what a part folds away on save (a prefix's MLP) is replaced by its result.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    counts: dict[tuple[str, str], int] = {}
    for part in record.parts:
        key = (part.site.path, part.method_name)
        number = counts[key] = counts.get(key, -1) + 1
        prefix = f"{part.site.path}:{part.method_name}.{number}"
        folded: dict[str, Tensor] = part.folded() if fold and hasattr(part, "folded") else {}
        own = dict(part.state_dict(keep_vars=True))
        if folded:
            own = {**folded, **{k: v for k, v in own.items() if k.startswith("gate.")}}
        for tensor, value in own.items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            out[f"{prefix}.{tensor}"] = value
    return out


def replaced(record: Record) -> set[str]:
    """Names of base tensors that the adapter replaces whole, so that the base's own do not matter."""
    return {f"{p.site.path}.{p.site.tensor}" if p.site.path else p.site.tensor for p in record.parts if getattr(p, "replaces", False)}


def fingerprint(model: nn.Module, without: set[str]) -> dict[str, Any]:
    """What tells a base from another: class, sizes, and a few numbers of some tensors (none on the meta device)."""
    from .attach import KEY

    merged = model.__dict__["_veneer_state"].merged if "_veneer_state" in model.__dict__ else None
    kept = {i: d for i, (_, d) in merged.kept.items()} if merged is not None else {}
    tensors = [(n, p) for n, p in model.named_parameters() if f"{KEY}." not in n and n not in without and p.is_floating_point()]
    from . import resolve

    head = {s.path for s in resolve.sites(model) if s.role == "head" and s.port == "param"}
    tied = {id(p) for n, p in tensors if n.rpartition(".")[0] not in head}
    body = [(n, p) for n, p in tensors if n.rpartition(".")[0] not in head or id(p) in tied]
    samples: dict[str, list[float]] = {}
    step = max(1, len(body) // SAMPLES)
    for n, p in body[::step]:
        data = kept.get(id(p), p.detach())
        if data.is_meta or not data.numel():
            continue
        flat = data.reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, min(EACH, flat.numel()), device=flat.device, dtype=torch.float64).long()
        samples[n] = [float(v) for v in flat[at].float().cpu()]
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "model_type": str(getattr(config, "model_type", "") or ""),
        "shapes": {n: list(p.shape) for n, p in body},
        "samples": samples,
    }


def compare(saved: dict[str, Any], model: nn.Module, where: str, without: set[str]) -> None:
    """Raise StoreError unless `model` is the base that `saved` describes (in any floating dtype)."""
    here = fingerprint(model, without)
    shapes = {n: s for n, s in saved.get("shapes", {}).items() if n not in without}
    different = [n for n, s in shapes.items() if n in here["shapes"] and here["shapes"][n] != s]
    missing = [n for n in shapes if n not in here["shapes"]]
    fix = f"It was trained on {saved.get('name_or_path') or saved.get('class')!r}"
    quantised = any(not p.is_floating_point() for p in model.parameters())
    if different:
        n = different[0]
        raise StoreError(f"the adapter is for another base: {n} is {here['shapes'][n]} here and {shapes[n]} there", where=where, fix=fix)
    if missing and not quantised:
        raise StoreError(f"the adapter is for another base: there is no {missing[0]} here", where=where, fix=fix)
    for n, old in saved.get("samples", {}).items():
        new = here["samples"].get(n)
        p = dict(model.named_parameters()).get(n) if new is None and n not in without else None
        if new is None and (p is None or p.is_meta):
            continue
        if new is None:
            continue
        a, b = torch.tensor(old), torch.tensor(new)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=2e-2, atol=2e-3 * float(a.abs().max().clamp(min=1e-6))):
            raise StoreError(
                f"the adapter is for another base: the numbers of {n} differ", where=where, fix=f"{fix}; vn.load(..., check_base=False) loads it anyway"
            )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError("there is no adapter here", where=str(path), fix="Give the folder that vn.save wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as e:
        raise StoreError(f"not a JSON file: {e}", where=str(path), fix="The file is damaged; take another copy") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise StoreError("the weights are missing", where=str(path)) from None
    except (SafetensorError, OSError, ValueError) as e:
        raise StoreError(f"not a whole safetensors file: {e}", where=str(path), fix="The file is truncated or damaged; take another copy") from None


def load(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, activate: bool = True, check_base: bool = True) -> Adapter:
    """Attach the adapter saved in the folder `path`, in either format, as `name` (default: its own name).

    check_base  refuse a base of other shapes or other numbers (compared within what a cast to half precision changes)

    Raises: StoreError for a missing, damaged, truncated or foreign file, or another base; the model is then as it was.
    """
    path = Path(path)
    if not (path / CONFIG).exists():
        from .peft_format import find, load_peft

        folder = find(path, name)
        if folder is not None:
            return load_peft(model, folder, name or ("default" if folder == path else folder.name), activate=activate)
    config = read_json(path / CONFIG)
    where = str(path / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise StoreError("not an adapter of this library", where=where)
    known_keys = {"format", "version", "name", "plan", "tensors", "base", "weights", "sha256"}
    for key in config:
        if key not in known_keys:
            raise StoreError(f"unknown key {key!r}", where=where, fix=did_you_mean(key, known_keys))
    if config.get("version") != VERSION:
        raise StoreError(f"version {config.get('version')!r} is not {VERSION}", where=where, fix="Update the library")
    weights = config.get("weights", WEIGHTS)
    if not isinstance(weights, str) or Path(weights).name != weights:
        raise StoreError(f"{weights!r} is not a file in this folder", where=where)
    tensors = read_tensors(path / weights)
    plan = Plan.from_dict(config.get("plan"), where=where)
    name = config.get("name") if name is None else name
    check_name(name)
    adapter = attach(model, plan, name=str(name), activate=False)
    state = state_of(model)
    try:
        record = state.adapters[adapter.name]
        if check_base:
            base = config.get("base")
            if not isinstance(base, dict) or not isinstance(base.get("shapes"), dict) or not isinstance(base.get("samples"), dict):
                raise StoreError("the description of the base is missing", where=where)
            compare(base, model, where, replaced(record))
        fill(model, record, tensors, str(path / weights))
    except VeneerError:
        detach(model, adapter.name)
        raise
    except (TypeError, ValueError, AttributeError) as e:
        detach(model, adapter.name)
        raise StoreError(f"a value that makes no sense: {e}", where=where, fix="The file is damaged; take another copy") from e
    if activate:
        state.active = (adapter.name,)
    state.refresh()
    return adapter


def fill(model: nn.Module, record: Record, tensors: dict[str, Tensor], where: str) -> None:
    """Copy saved tensors into the adapter; every one must have its place, and every place its tensor."""
    for part in record.parts:
        if hasattr(part, "unfold"):
            part.unfold()
    own = tensors_of(model, record, fold=False)
    for key in own:
        if key not in tensors:
            raise StoreError(f"the tensor {key!r} is missing", where=where, fix="The file is not whole, or from another base")
    for key, value in tensors.items():
        if key not in own:
            raise StoreError(f"a tensor {key!r} that the plan does not have", where=where, fix=did_you_mean(key, own))
        if own[key].shape != value.shape:
            raise StoreError(f"{key!r} has shape {list(value.shape)}, and {list(own[key].shape)} is needed", where=where)
    with torch.no_grad():
        for key, value in tensors.items():
            target = own[key]
            if target.dtype != value.dtype and target.is_floating_point():
                target.data = target.data.to(value.dtype)
            target.copy_(value)
