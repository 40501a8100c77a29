"""Soft prompts: tensors for the whole model, and the sizes of that model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import resolve
from ..errors import CapabilityError
from ..methods import CPT, Cartridge, MultitaskPrompt, Prefix, PromptTuning, PTuning
from ..methods.base import Build
from ..methods.cpt import CPTPart
from ..methods.parts import KVPart
from ..ops.positions import rotation
from ..patterns import select
from ..sites import Site
from .config import Draft, Source, task_of

KEY = "prompt_embeddings"
FACTORS = ("prefix_task_cols", "prefix_task_rows")
ENCODER = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
CONTEXT_FIELDS = (
    "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon",
    "opt_projection_format_epsilon",
)  # fmt: skip
TASKS = ("num_tasks", "num_ranks", "prompt_tuning_init_task", "prompt_tuning_init_state_dict_path")


def _two_towers(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _take(source: Source) -> Tensor:
    value = source.tensors.pop(KEY, None)
    if value is None or value.dim() != 2:
        raise source.fail(f"the tensor {KEY!r} is missing" if value is None else f"{KEY!r} has shape {list(value.shape)}, and two dimensions are needed")
    return value


# -- prompts before the input --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompts:
    """A type that is a prompt: what it becomes, the fields that are its own, and its tensors beside the prompt.

    `enter` takes the file, the prompt (n, d), our method and the site, and gives our tensors; `leave` takes a part, and gives the
    prompt and the others; `options` are our method's, from the file and n; `fields` follow from a part and its method.
    """

    make: type[Any]
    enter: Callable[[Source, Tensor, Any, Site], dict[str, Tensor]]
    leave: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
    options: Callable[[Source, int], dict[str, Any]] = lambda _, n: {"length": n, "before_cls": True}
    fields: Callable[[Any, Any], dict[str, Any]] = lambda *_: {}
    tasks: tuple[str, ...] = ()  # of PEFT's, where it has the type for these alone
    two_towers: bool = True  # False: in an encoder-decoder PEFT computes something else

    def _check(self, model: Any) -> None:
        if not self.two_towers and _two_towers(model):
            raise CapabilityError(
                f"in an encoder-decoder PEFT puts a {self.make.name} before the decoder's input too", fix="Save and load it in the native format"
            )

    def read(self, source: Source) -> list[Draft]:
        """The plan of a file. PEFT keeps a second half for the decoder, which its forward never uses."""
        self._check(source.model)
        value, n = _take(source), source.whole("num_virtual_tokens")
        site = select(source.sites, "embed", port="embed", default=True, why=resolve.why_not(source.model, "embed"))[0]
        if value.shape[0] not in (n, 2 * n) or value.shape[1] != site.width:
            raise source.fail(f"{KEY!r} has shape {list(value.shape)}, and {[n, site.width]} is needed", "The adapter is for another base")
        method = self.make(**self.options(source, n))
        return [Draft(method, {site: self.enter(source, value[:n], method, site)})]

    def write(self, model: Any, parts: list[Any], methods: list[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The fields and tensors of a file."""
        self._check(model)
        if len(parts) > 1 or parts[0].site != next(s for s in resolve.sites(model) if s.port == "embed"):
            raise CapabilityError("PEFT has one prompt a model, before its first tower", fix="Save it in the native format: vn.save(model, path)")
        part = parts[0]
        if self.tasks and task_of(model, ()) not in self.tasks:
            raise CapabilityError(f"PEFT has a {self.make.name} for {' and '.join(self.tasks)} alone", fix="Save it in the native format: vn.save(model, path)")
        if part.keep:
            name = self.make.__name__
            raise CapabilityError("PEFT puts a prompt before the CLS token, and this one comes after it", fix=f"Train it as vn.{name}(n, before_cls=True)")
        v, others = self.leave(part)
        fields = {**_sizes(model, v.shape[0], v.shape[1], resolve.sites(model)), **self.fields(part, methods[part.term])}
        return fields, {KEY: torch.cat([v, v]) if _two_towers(model) else v, **others}


def _one_task(source: Source, value: Tensor, *_: Any) -> dict[str, Tensor]:
    u, v = (source.tensors.pop(k, None) for k in FACTORS)
    if u is None or v is None or u.dim() != 3 or v.dim() != 3:
        raise source.fail(f"the tensors {FACTORS} are missing, or have not three dimensions", "The file is not whole; take another copy")
    if u.shape[0] != 1:
        raise source.fail(
            f"the file holds {u.shape[0]} tasks, and an adapter here is one",
            "Make a file of each with PEFT: MultitaskPromptTuningConfig(prompt_tuning_init='EXACT_SOURCE_TASK', prompt_tuning_init_task=…)",
        )
    return {"P": value, "u": u[0], "v": v[0].t()}


def _context_options(source: Source, n: int) -> dict[str, Any]:
    ids = source.config.get("cpt_token_ids")
    kinds = source.config.get("cpt_tokens_type_mask")
    if not isinstance(ids, list) or len(ids) != n or not (kinds is None or isinstance(kinds, list)):
        raise source.fail(f"cpt_token_ids are not the {n} tokens of the prompt", "The two files do not belong together")
    falls = source.config.get("opt_weighted_loss_type") == "decay"
    return {
        "ids": tuple(ids), "kinds": None if kinds is None else tuple(kinds), "decay": source.number("opt_loss_decay_factor", 1.0) if falls else 1.0,
        "bound": source.number("opt_projection_epsilon", 0.1), "format": source.number("opt_projection_format_epsilon", 0.1),
    }  # fmt: skip


def _context(source: Source, value: Tensor, m: CPT, site: Site) -> dict[str, Tensor]:
    """PEFT stores P alone. What of P - E(t) its ball allows is the delta, and P without it what is frozen."""
    part = CPTPart(site, Build(source.model), m)
    free = part.free.long().to(value.device)
    with torch.no_grad():
        part.delta.copy_((value - part.vectors.to(value))[free])
        delta = part.within().to(value)
    return {"vectors": value.index_add(0, free, -delta), "delta": delta}


def _context_fields(p: Any, m: CPT) -> dict[str, Any]:
    kinds = list(m.kinds or [1] * len(m.ids))
    return {
        "cpt_token_ids": list(m.ids), "cpt_mask": [1] * len(kinds), "cpt_tokens_type_mask": kinds, "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": m.decay, "opt_projection_epsilon": m.bound, "opt_projection_format_epsilon": m.format,
    }  # fmt: skip


PROMPT = Prompts(PromptTuning, lambda _, value, *__: {"vectors": value}, lambda p: (p.vectors.detach(), {}), fields=lambda *_: {"prompt_tuning_init": "RANDOM"})
CONTEXT = Prompts(CPT, _context, lambda p: (p.prompt().detach(), {}), _context_options, _context_fields, ("CAUSAL_LM",))
ENCODED = Prompts(  # of the encoder only the result is saved, on both sides
    PTuning,
    lambda _, value, *__: {"vectors": value},
    lambda p: (p.prompt().detach(), {}),
    fields=lambda p, _: {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": p.site.width, "encoder_num_layers": 2, "encoder_dropout": 0.0},
)
MULTITASK = Prompts(
    MultitaskPrompt,
    _one_task,
    lambda p: (p.P.detach(), dict(zip(FACTORS, (p.u.detach()[None], p.v.detach().t()[None]), strict=True))),
    options=lambda source, n: {"length": n, "before_cls": True, "rank": source.whole("num_ranks", 1)},
    fields=lambda p, _: {"prompt_tuning_init": "RANDOM", "num_tasks": 1, "num_ranks": p.u.shape[1]},
    two_towers=False,
)


# -- prefix tuning ----------------------------------------------------------------------------------------------------
def _layers(sites: list[Site]) -> list[Site]:
    return [s for s in sites if s.port == "kv" and s.role == "attn"]


def _refuse_two_towers(model: Any) -> None:
    if _two_towers(model):
        raise CapabilityError(
            "PEFT's prefix of an encoder-decoder gives layers i and i + L/2 one prefix, and counts it in relative positions",
            fix="Save and load it in the native format: vn.save(model, path)",
        )


def read_prefix(source: Source) -> list[Draft]:
    """The plan of a PREFIX_TUNING file."""
    values = _read_kv(source)
    return [Draft(Prefix(source.whole("num_virtual_tokens"), positions=True), {s: {"keys": k, "values": v} for s, (k, v) in values.items()})]


def read_cartridge(source: Source) -> list[Draft]:
    """The plan of a CARTRIDGE file, whose first rows are not trained."""
    values, f = _read_kv(source), source.count("num_frozen_tokens", 1)
    rows = {s: {"first_keys": k[:f], "keys": k[f:], "first_values": v[:f], "values": v[f:]} for s, (k, v) in values.items()}
    return [Draft(Cartridge(source.whole("num_virtual_tokens"), sink=f), rows)]


def _read_kv(source: Source) -> dict[Site, tuple[Tensor, Tensor]]:
    """Keys and values, (n, heads · head_dim) each: those of layer i are slots 2 i and 2 i + 1 of the second dimension."""
    _refuse_two_towers(source.model)
    value, n = _take(source), source.whole("num_virtual_tokens")
    layers = _layers(source.sites)
    width = sum(2 * s.heads * s.head_dim for s in layers)
    if not layers or tuple(value.shape) != (n, width) or len({(s.heads, s.head_dim) for s in layers}) > 1:
        raise source.fail(f"{KEY!r} has shape {list(value.shape)}, and {[n, width]} is needed", "The adapter is for another base")
    pairs = value.reshape(n, len(layers), 2, -1)
    return {s: (pairs[:, i, 0], pairs[:, i, 1]) for i, s in enumerate(layers)}


def write_prefix(model: Any, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a PREFIX_TUNING file."""
    fields, tensors = _write_kv(model, parts)
    return {**fields, "prefix_projection": False, "encoder_hidden_size": None}, tensors


def write_cartridge(model: Any, parts: list[Any], methods: list[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a CARTRIDGE file."""
    fields, tensors = _write_kv(model, parts)
    return {**fields, "num_frozen_tokens": methods[parts[0].term].sink}, tensors


def _write_kv(model: Any, parts: list[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What both have. A prefix without positions is turned into one with them, where positions are rotary."""
    _refuse_two_towers(model)
    sites = resolve.sites(model)
    kv: list[Any] = [p for p in parts if isinstance(p, KVPart)]
    if [p.site for p in kv] != _layers(sites):
        raise CapabilityError("PEFT's prefix is one in every self-attention", fix="Save it in the native format: vn.save(model, path)")
    shifted = len(kv) < len(parts)
    pairs = []
    for p in kv:
        k, v = (t.detach() for t in p.pair())
        if p.turn is None and not shifted:
            m = rotation(model, model.get_submodule(p.site.path), p.site.head_dim, p.length)
            if m is None:
                raise CapabilityError(
                    "in PEFT a prefix takes the first positions, and this one takes none",
                    fix=f"Train it with positions: vn.Prefix({p.length}, positions=True)",
                )
            k = (k.unflatten(-1, (p.heads, -1)) @ m.t().to(k)).flatten(1)  # a rotation's inverse is its transpose
        pairs += [k, v]
    fields = _sizes(model, kv[0].length, kv[0].heads * kv[0].site.head_dim, sites)
    if task_of(model, ()) != "CAUSAL_LM":
        # PEFT's classes for the other tasks look for an argument that transformers has renamed, and refuse; this one
        # hands the cache to the model and calls its head
        fields["task_type"] = "FEATURE_EXTRACTION"
    return {**fields, "num_attention_heads": kv[0].heads}, {KEY: torch.cat(pairs, 1)}


def _sizes(model: Any, n: int, width: int, sites: list[Site]) -> dict[str, Any]:
    layers = _layers(sites)
    return {
        "num_virtual_tokens": n, "token_dim": width, "num_layers": len(layers), "num_attention_heads": layers[0].heads if layers else None,
        "num_transformer_submodules": 2 if _two_towers(model) else 1,
    }  # fmt: skip
