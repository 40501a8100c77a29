"""Quantised bases: one key, transformers' own configurations."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError, did_you_mean


def _bits(**options: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if "bnb_4bit_quant_type" in options:
        options |= {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(**options)


def _ao(kind: str, **options: Any) -> Any:
    import importlib

    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), kind)(**options))


# name -> (package, what makes transformers' configuration)
QUANTISERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("bitsandbytes", lambda: _bits(bnb_4bit_quant_type="nf4")),  # QLoRA's: normal float, doubly quantised (Dettmers et al. 2023)
    "fp4": ("bitsandbytes", lambda: _bits(bnb_4bit_quant_type="fp4")),
    "int8": ("bitsandbytes", lambda: _bits(load_in_8bit=True)),  # LLM.int8() (Dettmers et al. 2022)
    "torchao-int8": ("torchao", lambda: _ao("Int8WeightOnlyConfig")),
    "torchao-int4": ("torchao", lambda: _ao("Int4WeightOnlyConfig", group_size=128)),
    "torchao-fp8": ("torchao", lambda: _ao("Float8WeightOnlyConfig")),
}


def quantization(name: str | None) -> dict[str, Any]:
    """from_pretrained's options for a base quantised as `name`. Raises: ConfigError where its package is missing."""
    if name is None:
        return {}
    if name not in QUANTISERS:
        raise ConfigError(f"there is no quantisation {name!r}", where="quantization", fix=did_you_mean(name, QUANTISERS))
    package, make = QUANTISERS[name]
    if find_spec(package) is None:
        raise ConfigError(f"quantization={name} needs the package {package!r}, which is not installed", where="quantization", fix='pip install "veneer[gpu]"')
    return {"quantization_config": make()}
