"""Merging: folding deviations that are linear in the weights into the weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import known_names
from .attach import state_of
from .errors import CapabilityError, MergeError, did_you_mean
from .methods.part import Part, module_at
from .methods.parts import MapPart, TensorPart
from .ops.maps import place, take
from .ops.weights import asked, plain
from .requantise import INTO, holding


@dataclass
class Merged:
    """What merging changed, so that it can be undone: the names, and each overwritten tensor's own data.

    error   the largest share of a tensor's change that rounding to its dtype lost, or quantising it again: 0 in fp32. A
            small adapter may all but vanish in a bf16 base, whose steps are coarser than it is, and more so in 4 bits
    replaced  modules of a quantised base: (the module that holds it, its name there, the base's own)
    """

    names: tuple[str, ...]
    active: tuple[str, ...]
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    added: list[tuple[nn.Module, str]] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    into: str | None = None
    error: float = 0.0


def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, into: str | None = None) -> Merged:
    """Fold the adapters `names` (default: the active ones) into the base's weights: no latency is left.

    W <- W + dW for each map, computed in fp32 (fp64 for an fp64 base) and rounded once; tensors that were overwritten
    are kept, so vn.unmerge restores them bit for bit. Until then no other adapter is active. What rounding lost is in the
    `error` of the answer.

    into    on a quantised base, what the merged weights become: 'dequantised' (ordinary linears in the base's dtype: exact,
            larger) or 'requantised' (packed again as the base was: small, and `error` says what that lost, which may be most
            of a small adapter). Where nothing is quantised it changes nothing

    Raises: AdapterError for an unknown name or one named twice; CapabilityError for a method or gate that is not linear
    in the weights, naming it; MergeError where something is merged already, for a quantised base without `into` or
    whose weights cannot be had, for weights tied to others, for an adapter with NaN or infinity, and for a result
    beyond the range of the base's dtype. Then the model is as before.
    """
    state = state_of(model)
    if state.merged is not None:
        raise MergeError(f"{list(state.merged.names)} are merged already", fix="vn.unmerge(model) first")
    if into is not None and into not in INTO:
        raise MergeError(f"into={into!r}", fix=did_you_mean(str(into), INTO))
    if state.resting:
        raise MergeError("the base's weights are in CPU memory (offload_base)", fix="vn.unoptimize(model) first")
    wanted = state.active if names is None else known_names(state, names)
    if not wanted:
        raise MergeError("there is no active adapter to merge", fix="Name one: vn.merge(model, 'mine')")
    new: dict[int, tuple[nn.Parameter, Tensor]] = {}
    added: dict[tuple[str, str], Tensor] = {}
    parts = [p for n in wanted for p in state.adapters[n].parts if p.acts]
    _check(model, state, wanted, parts, into)
    with torch.no_grad():
        # the same order as in a call: inputs, tensors, then outputs stage by stage
        rank = {"tensor": 0, "input": 1, "output": 2}
        for group in _groups(model, sorted(parts, key=lambda p: (rank[p.acts], p.stage))):
            before: dict[int, Tensor] = {}  # every part of a group sees the weights from before the group
            for p in group:
                _fold(model, p, len(group), before, new, added)
    merged = Merged(wanted, state.active, into=into)
    # all of them before the first is put in place: an error here leaves the base as it is
    quantised = {id(packed(model, p)): p.site for p in parts if packed(model, p) is not None}
    modules = [_replacement(model, quantised[i], value, merged) for i, (_, value) in new.items() if i in quantised]
    rounded = [(param, _rounded(param, value, merged)) for i, (param, value) in new.items() if i not in quantised]
    for parent, leaf, module in modules:
        merged.replaced.append((parent, leaf, parent._modules[leaf]))  # type: ignore[arg-type]
        parent._modules[leaf] = module
    for param, value in rounded:
        merged.kept[id(param)] = (param, param.data)
        param.data = value
    for (path, tensor), value in added.items():
        module = module_at(model, path)
        module.register_parameter(tensor, nn.Parameter(value, requires_grad=False))
        merged.added.append((module, tensor))
    state.merged, state.active = merged, ()
    state.refresh()
    return merged


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out again: every overwritten tensor gets its own data back, bit for bit.

    Raises: MergeError if nothing is merged.
    """
    state = state_of(model)
    if state.merged is None:
        raise MergeError("nothing is merged into this model", fix="vn.merge(model, 'mine') first")
    merged: Merged = state.merged
    for param, data in merged.kept.values():
        param.data = data.to(param.device, param.dtype)  # the model may have been moved or cast since
    for module, tensor in merged.added:
        module.register_parameter(tensor, None)
    for parent, leaf, module in merged.replaced:
        parent._modules[leaf] = module
    state.merged, state.active = None, tuple(n for n in merged.active if n in state.adapters)
    state.refresh()


def _rounded(param: nn.Parameter, value: Tensor, merged: Merged) -> Tensor:
    """`value` in the parameter's dtype and in memory of its own. Notes what rounding lost; refuses an overflow."""
    out = value.to(param.dtype, copy=True)
    if not out.is_meta and out.dtype != value.dtype:
        if not torch.isfinite(out).all() and torch.isfinite(param).all():
            raise MergeError(
                f"the merged weights are beyond the range of {str(out.dtype).removeprefix('torch.')}", fix="Load the base in bf16 or fp32 to merge"
            )
        change = (value - param.data).norm()
        if change > 0:
            merged.error = max(merged.error, float((out.to(value.dtype) - value).norm() / change))
    return out


def _check(model: nn.Module, state: Any, names: tuple[str, ...], parts: list[Part], into: str | None) -> None:
    for n in names:
        for term in state.adapters[n].plan.terms():
            m = term.method
            if not m.mergeable:
                raise CapabilityError(
                    f"{m.name} (in {n!r}) cannot be merged: it is not linear in the weights",
                    fix="Keep it attached, or settle to a plan of methods that merge (see vn.methods())",
                )
            if term.gate is not None and term.gate.per != "constant":
                raise CapabilityError(f"the gates of {n!r} vary with the input and cannot be merged", fix="vn.settle(model, batches) makes them constants")
    for p in parts:
        for key, value in p.named_parameters():
            if not value.is_meta and not torch.isfinite(value).all():
                raise MergeError(f"{p.method_name} has NaN or infinity in {key!r}", where=p.site.path, fix="The base is untouched; train or load it again")
    seen: dict[int, list[Part]] = {}
    tied: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                tied.setdefault(id(value), []).append(f"{path}.{key}" if path else key)
    for p in parts:
        name = p.site.tensor or "weight"
        module = module_at(model, p.site.path)
        param = module._parameters.get(name)
        where = f"{p.site.path}.{name}"
        if packed(model, p) is not None:
            if p.acts == "tensor" or p.site.kind != "linear":
                raise MergeError("the base's weight cannot be had here", where=where, fix="Keep the adapter attached, or load the base unquantised to merge")
            if into is None:
                raise MergeError("the base's weight is quantised", where=where, fix="Say what it becomes: into='dequantised' or into='requantised'")
            continue
        assert param is not None
        reached = {f"{e.site.path}.{e.site.tensor or 'weight'}" for e in p.echoes}
        others = [o for o in tied[id(param)] if o != where and o not in reached]
        if others:
            raise MergeError(
                f"this weight is tied to {others[0]}, which the adapter does not change", where=where,
                fix="Untie them first (config.tie_word_embeddings=False and a copy of the weight), or keep the adapter attached",
            )  # fmt: skip
        for q in seen.setdefault(id(param), []):
            # where the tensor is tied each reads W as it was before the other: their order in one W would be another
            if (q.site.path != p.site.path or p.echoes) and "input" in (p.acts, q.acts) and any(x.acts == "output" and x.reads_weight() for x in (p, q)):
                raise MergeError(
                    f"{q.method_name} at {q.site.path} and {p.method_name} here change one tied tensor from both sides", where=where,
                    fix="Merge one of them, or keep both attached",
                )  # fmt: skip
        seen[id(param)].append(p)


def packed(model: nn.Module, p: Part) -> Any:
    """What a quantiser stored in place of the weight that `p` acts on (its module, where it holds no such parameter);
    None for an ordinary tensor."""
    module = module_at(model, p.site.path)
    w = module._parameters.get(p.site.tensor or "weight")
    if w is None:
        return module
    ordinary = w.is_floating_point() and type(w.data) is Tensor and (isinstance(p, TensorPart) or p.acts == "tensor" or plain(w, p.site))
    return None if ordinary else w


def _replacement(model: nn.Module, site: Any, w: Tensor, merged: Merged) -> tuple[nn.Module, str, nn.Module]:
    """What takes the place of a quantised module: where it goes, under what name, and the module that computes w x + b."""
    path, _, leaf = site.path.rpartition(".")
    module = module_at(model, site.path)
    new = holding(model, module, w, merged.into or "", site.path)
    change = (w - asked(module, site.inp, module._parameters.get(site.tensor or "weight")).float()).norm()
    if change > 0:
        held = asked(new, site.inp, new._parameters.get("weight")).float()
        merged.error = max(merged.error, float((held - w).norm() / change))
    return module_at(model, path), leaf, new


def _groups(model: nn.Module, parts: list[Part]) -> list[list[Part]]:
    """Parts that see the same weights: same tensor, phase and stage."""
    out: dict[Any, list[Part]] = {}
    for p in parts:
        phase = (p.acts, p.stage if p.acts != "tensor" else 0)
        tensor = module_at(model, p.site.path)._parameters[p.site.tensor or "weight"]
        out.setdefault((id(tensor), phase), []).append(p)
    return list(out.values())


def _fold(
    model: nn.Module, p: Part, together: int, before: dict[int, Tensor], new: dict[int, tuple[nn.Parameter, Tensor]], added: dict[tuple[str, str], Tensor]
) -> None:
    module = module_at(model, p.site.path)

    def current(name: str) -> tuple[nn.Parameter | None, Tensor | None]:
        param = module._parameters.get(name)
        if param is None:
            return None, None
        if id(param) in new:
            return param, new[id(param)][1]
        if name == (p.site.tensor or "weight") and packed(model, p) is not None:
            return param, asked(module, p.site.inp, param).float()
        return param, param.data.to(torch.promote_types(param.dtype, torch.float32))

    def gate() -> float:
        return 1.0 if p.gate is None else float(p.gate(None, None))

    if p.acts == "tensor":
        param, w = current(p.site.tensor)
        assert param is not None and w is not None
        base = param.data.to(w.dtype)
        value = p.value(base) if p.gate is None else base + gate() * (p.value(base) - base)
        new[id(param)] = (param, value if together == 1 and id(param) not in new else w + (value - base))
        return
    assert isinstance(p, MapPart)
    param, w = current(p.site.tensor or "weight")
    assert param is not None and w is not None
    bias, b = current("bias")
    old_w = before.setdefault(id(param), w)
    old_b = None if bias is None or b is None else before.setdefault(id(bias), b)
    dw, db = p.fold(p.map.canonical(old_w), None if old_b is None else take(old_b, p.site.slice))
    g = gate()
    new[id(param)] = (param, w + p.map.stored(g * dw, w))
    if db is not None:
        if bias is not None and b is not None:
            new[id(bias)] = (bias, b + place(g * db, p.site.slice))
        elif bool(db.any()):
            added[(p.site.path, "bias")] = (g * db).to(param.dtype)
