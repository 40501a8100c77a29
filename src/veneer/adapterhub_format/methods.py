"""AdapterHub's methods as a table: which configurations and keys are whose, and what they become here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import did_you_mean
from ..methods import IA3, Bottleneck, LoRA, Prefix
from ..methods.activations import ACTIVATIONS
from ..peft_format.config import Draft, Source
from ..peft_format.places import pattern, sites_at
from ..sites import Site

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """One of its architectures.

    key     what its tensors' keys look like: `path`, and `tensor`, under the adapter's name
    uses    fields that are read
    fixed   fields with the one value that has a counterpart here
    idle    fields that tell of training and of places alone; keys and shapes say which these are
    read    the configuration and the tensors by path -> methods with the tensors of each site
    """

    key: str
    uses: tuple[str, ...]
    fixed: dict[str, Any]
    idle: tuple[str, ...]
    read: Callable[[Source, dict[str, Tensors]], list[Draft]]

    def check(self, source: Source) -> None:
        """Refuse fields that change the function and are not read."""
        for field, value in source.config.items():
            if field in self.fixed and value != self.fixed[field] and value is not None:
                raise source.fail(f"{field}={value!r} has no counterpart here", f"Only {field}={self.fixed[field]!r} has: keep such an adapter in AdapterHub")
            if field not in (*self.fixed, *self.uses, *self.idle, "architecture"):
                known = (*self.fixed, *self.uses, *self.idle)
                raise source.fail(f"{field}={value!r} is not known, and leaving it out might change the function", did_you_mean(field, known))


def gate_of(tensors: Tensors, prefix: str = "gate.") -> Tensors:
    """The tensors of a gate, one for the whole state."""
    return {f"gate.{k}": tensors[prefix + k].reshape(-1) for k in ("weight", "bias") if prefix + k in tensors}


def activation(source: Source) -> str:
    name = str(source.config.get("non_linearity") or "identity").lower()
    if name not in ACTIVATIONS:
        raise source.fail(f"non_linearity={name!r} is not known here", did_you_mean(name, ACTIVATIONS))
    return name


def number(source: Source, site: Site) -> int:
    """The number of a layer as AdapterHub counts it: a decoder's go on from its encoder's."""
    below = [s.layer + 1 for s in source.sites if s.tower == "encoder" and s.layer is not None]
    return (site.layer or 0) + (max(below, default=0) if site.tower != "encoder" else 0)


def complete(source: Source, sites: Iterable[Site]) -> None:
    """Refuse a file that lacks a layer which is not in leave_out, at places that it has in others."""
    out, mine = source.config.get("leave_out") or [], set(sites)
    kinds = {(s.port, s.tower, s.role) for s in mine}
    for s in source.sites:
        if (s.port, s.tower, s.role) in kinds and s not in mine and number(source, s) not in out:
            raise source.fail(f"there is nothing for {s.path!r}, and leave_out={out} does not leave it out", "The file is not whole; take another copy")


# -- bottleneck -------------------------------------------------------------------------------------------------------
BOXES = {"attention_adapters": "attn", "output_adapters": "ffn", "cross_attention_adapters": "cross"}


def block(source: Source, path: str) -> Site:
    """The block whose state the adapters in `path` change: the one that lies in it, or that the layer calls so."""
    above, _, box = path.rpartition(".")
    within = above if box in BOXES else path
    found = [s for s in source.sites if s.port == "hidden" and s.role in BOXES.values() and f"{s.path}.".startswith(f"{within}.")]
    found = [s for s in found if box not in BOXES or s.role == BOXES[box]]
    if len(found) != 1:
        raise source.fail(f"{path!r} is not one block of this model", "The adapter is for another base")
    return found[0]


def bottleneck(source: Source, found: dict[str, Tensors]) -> list[Draft]:
    scaling, parallel = source.config.get("scaling", 1.0), source.flag("is_parallel")
    before = source.flag("original_ln_before")
    if before and not parallel and source.config.get("residual_before_ln", True) is not True:
        raise source.fail(f"residual_before_ln={source.config['residual_before_ln']!r} has no counterpart here", "Only residual_before_ln=True has")
    learnt = scaling in ("learned", "channel")
    options = {
        "activation": activation(source), "parallel": parallel, "residual": parallel or before, "norm": source.flag("ln_before"),
        "dropout": source.number("dropout", 0.0), "scale": "learnt" if scaling == "learned" else 1.0 if learnt else source.finite("scaling", scaling),
    }  # fmt: skip
    drafts: dict[int, Draft] = {}
    for path, t in found.items():
        site = block(source, path)
        last = "adapter_down.1" if options["norm"] else "adapter_down.0"
        own = {"down": t[f"{last}.weight"], "down_bias": t[f"{last}.bias"], "up": t["adapter_up.weight"], "up_bias": t["adapter_up.bias"], **gate_of(t)}
        if options["norm"]:
            own |= {f"norm.{k}": t[f"adapter_norm_before.{k}"] for k in ("weight", "bias")}
        if scaling == "learned":
            own["scale"] = t["scaling"].reshape(1)
        elif learnt:  # one number a channel, which W_up and b_up can hold
            own["up"], own["up_bias"] = own["up"] * t["scaling"][:, None], own["up_bias"] * t["scaling"]
        drafts.setdefault(own["down"].shape[0], Draft(Bottleneck(1))).values[site] = own
    complete(source, (s for d in drafts.values() for s in d.values))
    return [Draft(Bottleneck(n, at=pattern(source.sites, list(d.values), source.where), **options), d.values) for n, d in drafts.items()]


# -- LoRA and (IA)³ ---------------------------------------------------------------------------------------------------
def low_rank(source: Source, found: dict[str, Tensors]) -> list[Draft]:
    r, alpha = source.whole("r", 8), source.number("alpha", 8)
    scale = source.config.get("composition_mode", "add")
    if scale not in ("add", "scale") or (scale == "scale" and source.flag("use_gating")):
        raise source.fail(f"composition_mode={scale!r} with use_gating={source.flag('use_gating')} has no counterpart here")
    values: dict[Site, Tensors] = {}
    for path, t in found.items():
        sites = sites_at(source, path, "weight")
        if len(sites) > 1:  # a fused projection: the chosen matrices after one another
            sites = [s for s in sites if s.role.rpartition(".")[2] in source.names("attn_matrices")]
        n = len(sites)
        for i, s in enumerate(sites):
            b = t["lora_B"].chunk(n, 0)[i]
            gate = {k: v.chunk(n, 0)[i] for k, v in gate_of(t).items()}
            values[s] = {"l": b.reshape(-1) * alpha} if scale == "scale" else {"A": t["lora_A"].chunk(n, 0)[i], "B": b, **gate}
    complete(source, values)
    at = pattern(source.sites, list(values), source.where)
    method = IA3(at=at, on="output") if scale == "scale" else LoRA(r, alpha=alpha, dropout=source.number("dropout", 0.0), at=at)
    return [Draft(method, values)]


# -- prefix -----------------------------------------------------------------------------------------------------------
GATES = "prefix_gates."
RELATIVE = ".relative_attention_bias"  # T5's


def prefix(source: Source, found: dict[str, Tensors]) -> list[Draft]:
    """Each group has the keys and values of its attentions in their order, but for those of the layers in leave_out."""
    if any(p.endswith(RELATIVE) for p, _ in source.model.named_modules()):
        raise source.fail("architecture='prefix_tuning': AdapterHub moves the relative positions of this model by the prefix' length", "Train it here")
    attention = [s for s in source.sites if s.port == "kv"]
    both = len({s.tower for s in attention}) > 1
    out = source.config.get("leave_out") or []
    values: dict[Site, Tensors] = {}
    n = source.whole("prefix_length", 30)
    for group, t in found.items():
        if group.startswith(GATES):
            continue
        role = "cross" if group.startswith("cross") else "attn"
        sites = [s for s in attention if s.role == role and number(source, s) not in out]
        if both and role == "attn":
            sites = [s for s in sites if (s.tower == "encoder") == group.startswith("encoder")]
        pairs = _flat(source, t).reshape(n, len(sites), 2, -1)
        for i, s in enumerate(sites):
            values[s] = {"keys": pairs[:, i, 0], "values": pairs[:, i, 1]}
    for s, own in values.items():
        own.update(gate_of(found.get(GATES + s.path, {}), ""))
    return [Draft(Prefix(n, at=pattern(source.sites, list(values), source.where)), values)]


def _flat(source: Source, t: Tensors) -> Tensor:
    if "control_trans" in t:
        return t["control_trans"]
    z = ACTIVATIONS[activation(source)](nn.functional.linear(t["wte.weight"], t["control_trans.0.weight"], t["control_trans.0.bias"]))
    return nn.functional.linear(z, t["control_trans.2.weight"], t["control_trans.2.bias"])


PHM = ("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm")
FORMS: dict[str | None, Form] = {
    None: Form(
        r"(?P<path>.+)\.adapters\.{name}\.(?P<tensor>.+)",
        ("non_linearity", "original_ln_before", "residual_before_ln", "is_parallel", "scaling", "use_gating", "ln_before", "dropout"),
        {"original_ln_after": True, "ln_after": False, "phm_layer": False, "inv_adapter": None},
        (
            "mh_adapter", "output_adapter", "cross_adapter", "leave_out", "reduction_factor", "init_weights", "init_weights_seed", "stochastic_depth",
            "adapter_residual_before_ln", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", *PHM,
        ),
        bottleneck,
    ),
    "lora": Form(
        r"(?P<path>.+)\.loras\.{name}\.(?P<tensor>.+)",
        ("r", "alpha", "dropout", "attn_matrices", "composition_mode", "use_gating"),
        {"use_dora": False, "vera_d": None, "vera_b": None},
        ("selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "init_weights", "init_weights_seed", "dtype"),
        low_rank,
    ),
    "prefix_tuning": Form(
        r"(?:.*\.)?prefix_tunings\.{name}\.(?P<path>\w+)\.(?P<tensor>.+)|(?P<place>.+)\.prefix_tuning\.prefix_gates\.{name}\.(?P<part>\w+)",
        ("prefix_length", "leave_out", "flat", "non_linearity", "use_gating"),
        {"shared_gating": True},
        ("encoder_prefix", "cross_prefix", "bottleneck_size", "dropout", "init_weights_seed"),
        prefix,
    ),
}  # fmt: skip


def sort(form: Form, name: str, tensors: Tensors) -> dict[str, Tensors]:
    """The tensors of one architecture by path; takes them out of `tensors`. A prefix stands once for each module that it is
    shared with."""
    pattern = re.compile(form.key.replace("{name}", re.escape(name)))
    out: dict[str, Tensors] = {}
    for key in list(tensors):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        path, tensor = (found["path"], found["tensor"]) if found["path"] else (GATES + found["place"], found["part"])
        before = out.setdefault(path, {}).get(tensor)
        if before is not None and not torch.equal(before, tensors[key]):
            raise ValueError(f"{key!r} stands there twice, with other numbers")
        out[path][tensor] = tensors.pop(key)
    return out
