"""Soft prompts: tensors for the whole model, and the sizes of that model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import resolve
from ..errors import CapabilityError
from ..methods import MultitaskPrompt, Prefix, PromptTuning, PTuning
from ..methods.parts import KVPart
from ..ops.positions import rotation
from ..patterns import select
from ..sites import Site
from .config import Draft, Source, task_of

KEY = "prompt_embeddings"
FACTORS = ("prefix_task_cols", "prefix_task_rows")
ENCODER = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
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

    `enter` takes the file and the prompt (n, d), and gives our tensors; `leave` takes a part, and gives the prompt and the
    others; `options` are those of our method that follow from the fields, `fields` the fields that follow from a part.
    """

    make: type[Any]
    enter: Callable[[Source, Tensor], dict[str, Tensor]]
    leave: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
    options: Callable[[Source], dict[str, Any]] = lambda _: {}
    fields: Callable[[Any], dict[str, Any]] = lambda _: {}
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
        return [Draft(self.make(n, before_cls=True, **self.options(source)), {site: self.enter(source, value[:n])})]

    def write(self, model: Any, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The fields and tensors of a file."""
        self._check(model)
        if len(parts) > 1 or parts[0].site != next(s for s in resolve.sites(model) if s.port == "embed"):
            raise CapabilityError("PEFT has one prompt a model, before its first tower", fix="Save it in the native format: vn.save(model, path)")
        part = parts[0]
        if part.keep:
            name = self.make.__name__
            raise CapabilityError("PEFT puts a prompt before the CLS token, and this one comes after it", fix=f"Train it as vn.{name}(n, before_cls=True)")
        v, others = self.leave(part)
        fields = {**_sizes(model, v.shape[0], v.shape[1], resolve.sites(model)), **self.fields(part)}
        return fields, {KEY: torch.cat([v, v]) if _two_towers(model) else v, **others}


def _one_task(source: Source, value: Tensor) -> dict[str, Tensor]:
    u, v = (source.tensors.pop(k, None) for k in FACTORS)
    if u is None or v is None or u.dim() != 3 or v.dim() != 3:
        raise source.fail(f"the tensors {FACTORS} are missing, or have not three dimensions", "The file is not whole; take another copy")
    if u.shape[0] != 1:
        raise source.fail(
            f"the file holds {u.shape[0]} tasks, and an adapter here is one",
            "Make a file of each with PEFT: MultitaskPromptTuningConfig(prompt_tuning_init='EXACT_SOURCE_TASK', prompt_tuning_init_task=…)",
        )
    return {"P": value, "u": u[0], "v": v[0].t()}


PROMPT = Prompts(PromptTuning, lambda _, value: {"vectors": value}, lambda p: (p.vectors.detach(), {}), fields=lambda _: {"prompt_tuning_init": "RANDOM"})
ENCODED = Prompts(  # of the encoder only the result is saved, on both sides
    PTuning,
    lambda _, value: {"vectors": value},
    lambda p: (p.prompt().detach(), {}),
    fields=lambda p: {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": p.site.width, "encoder_num_layers": 2, "encoder_dropout": 0.0},
)
MULTITASK = Prompts(
    MultitaskPrompt,
    _one_task,
    lambda p: (p.P.detach(), dict(zip(FACTORS, (p.u.detach()[None], p.v.detach().t()[None]), strict=True))),
    options=lambda source: {"rank": source.whole("num_ranks", 1)},
    fields=lambda p: {"prompt_tuning_init": "RANDOM", "num_tasks": 1, "num_ranks": p.u.shape[1]},
    two_towers=False,
)


# -- prefix tuning ----------------------------------------------------------------------------------------------------
def _layers(sites: list[Site]) -> list[Site]:
    return [s for s in sites if s.port == "kv" and s.role == "attn"]


def _refuse_two_towers(model: Any) -> None:
    if _two_towers(model):
        raise CapabilityError(
            "PEFT's PREFIX_TUNING of an encoder-decoder gives layers i and i + L/2 one prefix, and counts it in relative positions",
            fix="Save and load it in the native format: vn.save(model, path)",
        )


def read_prefix(source: Source) -> list[Draft]:
    """The plan of a PREFIX_TUNING file: keys and values of layer i are slots 2 i and 2 i + 1 of the second dimension."""
    _refuse_two_towers(source.model)
    value, n = _take(source), source.whole("num_virtual_tokens")
    layers = _layers(source.sites)
    width = sum(2 * s.heads * s.head_dim for s in layers)
    if not layers or tuple(value.shape) != (n, width) or len({(s.heads, s.head_dim) for s in layers}) > 1:
        raise source.fail(f"{KEY!r} has shape {list(value.shape)}, and {[n, width]} is needed", "The adapter is for another base")
    pairs = value.reshape(n, len(layers), 2, -1)
    values = {s: {"keys": pairs[:, i, 0], "values": pairs[:, i, 1]} for i, s in enumerate(layers)}
    return [Draft(Prefix(n, positions=True), values)]


def write_prefix(model: Any, parts: list[Any], _: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a PREFIX_TUNING file. A prefix without positions is turned into one with them, where
    positions are rotary."""
    _refuse_two_towers(model)
    sites = resolve.sites(model)
    kv: list[Any] = [p for p in parts if isinstance(p, KVPart)]
    if [p.site for p in kv] != _layers(sites):
        raise CapabilityError("PEFT's PREFIX_TUNING is one prefix in every self-attention", fix="Save it in the native format: vn.save(model, path)")
    shifted = len(kv) < len(parts)
    pairs = []
    for p in kv:
        k, v = (t.detach() for t in p.pair())
        if p.turn is None and not shifted:
            m = rotation(model, model.get_submodule(p.site.path), p.site.head_dim, p.length)
            if m is None:
                raise CapabilityError(
                    "in PEFT a prefix takes the first positions, and this one takes none",
                    fix=f"Train it as vn.Prefix({p.length}, positions=True)",
                )
            k = (k.unflatten(-1, (p.heads, -1)) @ m.t().to(k)).flatten(1)  # a rotation's inverse is its transpose
        pairs += [k, v]
    fields = _sizes(model, kv[0].length, kv[0].heads * kv[0].site.head_dim, sites)
    if task_of(model, ()) != "CAUSAL_LM":
        # PEFT's classes for the other tasks look for an argument that transformers has renamed, and refuse; this one
        # hands the cache to the model and calls its head
        fields["task_type"] = "FEATURE_EXTRACTION"
    return {**fields, "num_attention_heads": kv[0].heads, "prefix_projection": False, "encoder_hidden_size": None}, {KEY: torch.cat(pairs, 1)}


def _sizes(model: Any, n: int, width: int, sites: list[Site]) -> dict[str, Any]:
    layers = _layers(sites)
    return {
        "num_virtual_tokens": n, "token_dim": width, "num_layers": len(layers), "num_attention_heads": layers[0].heads if layers else None,
        "num_transformer_submodules": 2 if _two_towers(model) else 1,
    }  # fmt: skip
