"""A LoRA adapter for llama.cpp, in GGUF.

llama.cpp adds s · B A to the tensor W of its own file, with s = adapter.lora.alpha / r, from pairs `NAME.lora_a` (r, in) and
`NAME.lora_b` (out, r). Its names come from the package gguf. For the families whose rotary embedding it computes on
neighbouring pairs, the rows of q and k are stored in another order than transformers has, so B's rows are too.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...attach import detach
from ...errors import CapabilityError, StoreError, did_you_mean
from ...files import read_tensors
from ...store import save
from ..measure import output
from ..opened import Opened
from . import Target, one

FILE = "adapter.gguf"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
ONLY = "llama.cpp's adapters hold LoRA on linear maps"


@dataclass(frozen=True)
class Family:
    """llama.cpp's name of an architecture, and whether it stores q and k with the rows of each head in pairs."""

    name: str
    paired: bool = False


# transformers' model_type -> llama.cpp's architecture, where both keep one tensor for one linear
FAMILIES = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "granite": Family("granite", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "phi3": Family("phi3"),
    "olmo2": Family("olmo2"),
    "starcoder2": Family("starcoder2"),
}


def paired(w: Tensor, heads: int) -> Tensor:
    """Rows (head, half, i) -> (head, i, half): from transformers' order, whose rotary embedding turns the halves of a head
    against each other, to llama.cpp's, which turns neighbours. w (heads · d, …)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def halved(w: Tensor, heads: int) -> Tensor:
    """The inverse of `paired`."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def write(opened: Opened, folder: Path) -> Path:
    """Write adapter.gguf. Every scale is folded into B, so that one alpha serves ranks of all sizes.

    Raises: CapabilityError for a family that is not known here, and for anything but LoRA on linear maps.
    """
    import gguf

    model, name = opened.model, one(opened)
    family, names = _names(model)
    pairs = _pairs(model, name)
    alpha = float(max(a.shape[0] for a, _, _ in pairs.values()))
    path = folder / FILE
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    for module, (a, b, scale) in pairs.items():
        if module not in names:
            raise CapabilityError(f"llama.cpp has no tensor for {module!r}", where=family.name, fix=f"{ONLY} that its own file has; merge instead")
        rank = a.shape[0]
        order = _order(family, model, module, paired)
        writer.add_tensor(f"{names[module]}.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{names[module]}.lora_b", (order(b.float()) * (scale * rank / alpha)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _names(model: Any) -> tuple[Family, dict[str, str]]:
    """The family, and llama.cpp's name of the weight of each of the model's modules."""
    import gguf

    kind = model.config.model_type
    if kind not in FAMILIES:
        raise CapabilityError(f"how llama.cpp stores {kind!r} is not known here", fix=f"{did_you_mean(kind, FAMILIES)} Or merge, and convert that checkpoint")
    family = FAMILIES[kind]
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family.name)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {path: table.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return family, {path: n for path, n in found.items() if n is not None}


def _pairs(model: Any, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scale) by module: what PEFT's file of the adapter says, whose rules for it are those that llama.cpp's follow."""
    with tempfile.TemporaryDirectory() as aside:
        try:
            place = save(model, aside, name=name, format="peft")
        except CapabilityError as e:
            raise CapabilityError(
                f"{ONLY}: {e.what}", where=e.where, fix="Settle the gates first, or merge (veneer merge) and convert that checkpoint"
            ) from None
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = read_tensors(place / "adapter_model.safetensors")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if config["peft_type"] != "LORA" or match is None or value.dim() != 2:
            raise CapabilityError(f"{ONLY}, and this one has {key.removeprefix('base_model.model.')!r}", fix="Merge it (veneer merge), and convert that")
        pairs.setdefault(match["path"], {})[match["side"]] = value

    def of(table: str, plain: float, path: str) -> float:
        return next((v for k, v in (config.get(table) or {}).items() if re.match(rf"(.*\.)?({k})$", path)), plain)

    out = {}
    for path, pair in pairs.items():
        root = pair["A"].shape[0] ** 0.5 if config.get("use_rslora") else pair["A"].shape[0]
        out[path] = pair["A"], pair["B"], of("alpha_pattern", config["lora_alpha"], path) / root
    return out


def _order(family: Family, model: Any, module: str, how: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
    """What puts the rows of `module` into the other program's order."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}.get(module.rpartition(".")[2])
    return (lambda w: how(w, heads)) if family.paired and heads else lambda w: w


def read(opened: Opened, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The output of the bare base with s · B A added to its weights, as llama.cpp does, from what the package gguf reads.

    Raises: StoreError where the file breaks one of llama.cpp's rules.
    """
    import gguf

    detach(opened.model)
    family, names = _names(opened.model)
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", family.name)):
        if value(key) != wanted:
            raise StoreError(f"{key} is {value(key)!r}, not {wanted!r}", where=str(path))
    sides: dict[str, dict[str, Tensor]] = {}
    for t in reader.tensors:
        stem, _, side = t.name.rpartition(".")
        sides.setdefault(stem, {})[side] = torch.tensor(t.data)
    modules = {n: m for m, n in names.items()}
    with torch.no_grad():
        for stem, pair in sides.items():
            if set(pair) != {"lora_a", "lora_b"} or stem not in modules:
                raise StoreError(f"{stem!r} has {sorted(pair)}", where=str(path), fix="llama.cpp wants a pair for a tensor of its own")
            a, b, weight = pair["lora_a"], pair["lora_b"], opened.model.get_submodule(modules[stem]).weight
            if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
                raise StoreError(f"{stem!r} is {list(weight.shape)}, with A {list(a.shape)} and B {list(b.shape)}", where=str(path))
            weight += value("adapter.lora.alpha") / a.shape[0] * (_order(family, opened.model, modules[stem], halved)(b) @ a).to(weight)
    return output(opened.model, inputs)


TARGET = Target("gguf", (), write, read)
