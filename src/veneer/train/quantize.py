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


def _ao(kind: str, module: str = "torchao.quantization", **options: Any) -> Any:
    import importlib

    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(importlib.import_module(module), kind)(**options))


def _ao4(device: str) -> Any:
    """torchao's 4 bits in groups of 128: what torch's own kernel reads, which is packed otherwise for a CPU."""
    if device == "cpu":
        return _ao("PrototypeInt4WeightOnlyConfig", "torchao.prototype.quantization.int4", group_size=128, set_inductor_config=False)
    return _ao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d")


# name -> (package, what makes transformers' configuration for a kind of device, what else from_pretrained must be given)
QUANTISERS: dict[str, tuple[str, Callable[[str], Any], dict[str, Any]]] = {
    "nf4": ("bitsandbytes", lambda _: _bits(bnb_4bit_quant_type="nf4"), {}),  # QLoRA's: normal float, doubly quantised (Dettmers et al. 2023)
    "fp4": ("bitsandbytes", lambda _: _bits(bnb_4bit_quant_type="fp4"), {}),
    "int8": ("bitsandbytes", lambda _: _bits(load_in_8bit=True), {}),  # LLM.int8() (Dettmers et al. 2022)
    "torchao-int8": ("torchao", lambda _: _ao("Int8WeightOnlyConfig"), {}),
    # on GPUs its kernel takes nothing but bf16, and on CPUs it is slow with anything else
    "torchao-int4": ("torchao", _ao4, {"dtype": "bfloat16"}),
    "torchao-fp8": ("torchao", lambda _: _ao("Float8WeightOnlyConfig"), {}),
}


def quantization(name: str | None, device: str | None = None) -> dict[str, Any]:
    """from_pretrained's options for a base quantised as `name`, its dtype among them where that is not free.

    device  that it is packed for and loaded to; default: the accelerator's current one, or the CPU where there is none

    Raises: ConfigError where its package is missing.
    """
    if name is None:
        return {}
    if name not in QUANTISERS:
        raise ConfigError(f"there is no quantisation {name!r}", where="quantization", fix=did_you_mean(name, QUANTISERS))
    package, make, options = QUANTISERS[name]
    if find_spec(package) is None:
        raise ConfigError(f"quantization={name} needs the package {package!r}, which is not installed", where="quantization", fix='pip install "veneer[quant]"')
    import torch

    if device is None:
        device = f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}" if torch.accelerator.is_available() else "cpu"
    return {"quantization_config": make(torch.device(device).type), "device_map": {"": device}} | options
