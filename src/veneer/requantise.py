"""Modules for merged weights on a quantised base: an ordinary linear, or the quantiser's own again.

No quantiser has a case of its own: transformers' quantiser of the model is asked to do with one matrix what it did with
all of them when it loaded the base.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MergeError

INTO = ("dequantised", "requantised")


def holding(model: nn.Module, module: nn.Module, w: Tensor, into: str, where: str) -> nn.Module:
    """A module that computes w x + b, with the bias of `module`, which keeps its own. Raises: MergeError."""
    bias = module._parameters.get("bias")
    dtype = bias.dtype if bias is not None else getattr(model, "dtype", w.dtype)
    if into == "dequantised":
        with torch.device("meta"):
            new: nn.Module = nn.Linear(w.shape[1], w.shape[0], bias=False)
        new.register_parameter("weight", nn.Parameter(w.to(dtype), requires_grad=False))
    else:
        new = _quantised(model, w.to(dtype), where)
    new.register_parameter("bias", bias)
    return new.train(module.training)


def _quantised(model: nn.Module, w: Tensor, where: str) -> nn.Module:
    from transformers import PretrainedConfig, PreTrainedModel

    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        raise MergeError("the model has no quantiser of transformers to quantise with again", where=where, fix="Merge with into='dequantised'")

    class One(PreTrainedModel):
        """A model of one linear; `last` is there because quantisers leave a model's last module alone."""

        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
            self.last = nn.Linear(1, 1)
            self.all_tied_weights_keys = {}

        def get_input_embeddings(self) -> Any:
            return None

    mine = copy.copy(quantiser)
    mine.pre_quantized, mine.quantization_config = False, copy.deepcopy(quantiser.quantization_config)
    try:
        with torch.device("meta"):
            one = One()
        mine._process_model_before_weight_loading(one, device_map=None, keep_in_fp32_modules=[], checkpoint_files=None)
        made = mine.get_quantize_ops().convert({"linear.weight": w}, full_layer_name="linear.weight", model=one, missing_keys=set())
        for value in made.values():
            one.linear._parameters["weight"] = value
    except Exception as e:  # whatever that quantiser cannot do
        raise MergeError(
            f"{type(quantiser).__name__} cannot quantise a weight again: {str(e).partition(chr(10))[0]}", where=where, fix="Merge with into='dequantised'"
        ) from e
    return one.linear.requires_grad_(False)
