"""What tells one base model from another, so that an adapter is not put on a base that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import StoreError

SAMPLES, EACH = 48, 8


def gathered(t: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has sharded (a DTensor); every process must ask for it."""
    whole = getattr(t, "full_tensor", None)
    return t if whole is None else whole()


def packed(t: Tensor) -> bool:
    """Whether a tensor is one in name only, its numbers in others (torchao's quantised weights); a sharded one is not."""
    return hasattr(t, "__tensor_flatten__") and not hasattr(t, "full_tensor")


def fingerprint(model: nn.Module, without: set[str]) -> dict[str, Any]:
    """Class, sizes, and a few numbers of some tensors (none on the meta device) of the base, merged or not.

    without  names of tensors that the adapter replaces whole, so that the base's own do not matter
    """
    from . import resolve
    from .structure import base_parameters

    merged = model.__dict__["_veneer_state"].merged if "_veneer_state" in model.__dict__ else None
    kept = {i: d for i, (_, d) in merged.kept.items()} if merged is not None else {}
    added = {id(m._parameters[t]) for m, t in merged.added} if merged is not None else set()
    tensors = [
        (n, p) for n, p in base_parameters(model)
        if n not in without and p.is_floating_point() and id(p) not in added and not packed(p)
    ]  # fmt: skip
    head = {s.path for s in resolve.sites(model) if s.role == "head" and s.port == "param"}
    tied = {id(p) for n, p in tensors if n.rpartition(".")[0] not in head}
    body = [(n, p) for n, p in tensors if n.rpartition(".")[0] not in head or id(p) in tied]
    samples: dict[str, list[float]] = {}
    step = max(1, len(body) // SAMPLES)
    for n, p in body[::step]:
        data = kept.get(id(p), p.detach())
        if data.is_meta or not data.numel():
            continue
        data = gathered(data)
        if type(data.data) is not Tensor:  # a quantiser's
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


def check_form(saved: Any, where: str) -> None:
    """Raise StoreError unless `saved` has the form that `fingerprint` gives."""

    def number(v: Any) -> bool:
        return isinstance(v, (int, float)) and not isinstance(v, bool) and (isinstance(v, float) or abs(v) < 1 << 62)

    def lists(d: Any, kind: Any) -> bool:
        return isinstance(d, dict) and all(isinstance(v, list) and all(map(kind, v)) for v in d.values())

    if not isinstance(saved, dict) or not lists(saved.get("shapes"), lambda v: number(v) and isinstance(v, int)) or not lists(saved.get("samples"), number):
        raise StoreError("the description of the base is missing, or makes no sense", where=where, fix="The file is damaged; take another copy")


def compare(saved: dict[str, Any], model: nn.Module, where: str, without: set[str]) -> None:
    """Raise StoreError unless `model` is the base that `saved` describes (in any floating dtype)."""
    here = fingerprint(model, without)
    shapes = {n: s for n, s in saved["shapes"].items() if n not in without}
    fix = f"It was trained on {saved.get('name_or_path') or saved.get('class')!r}"
    quantised = any(not p.is_floating_point() or packed(p) for p in model.parameters())
    for n, s in shapes.items():
        if n in here["shapes"] and here["shapes"][n] != s:
            raise StoreError(f"the adapter is for another base: {n} is {here['shapes'][n]} here and {s} there", where=where, fix=fix)
    missing = [n for n in shapes if n not in here["shapes"]]
    if missing and not quantised:
        raise StoreError(f"the adapter is for another base: there is no {missing[0]} here", where=where, fix=fix)
    for n, old in saved["samples"].items():
        new = here["samples"].get(n)
        if new is None:  # replaced, quantised, or on the meta device
            continue
        a, b = torch.tensor(old, dtype=torch.float64), torch.tensor(new, dtype=torch.float64)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=2e-2, atol=2e-3 * float(a.abs().max().clamp(min=1e-6)), equal_nan=True):
            raise StoreError(
                f"the adapter is for another base: the numbers of {n} differ", where=where, fix=f"{fix}; vn.load(..., check_base=False) loads it anyway"
            )
