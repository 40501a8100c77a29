"""Example inputs: what a model can be called with where there is no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

ROWS, TOKENS, SAMPLES = 2, 16, 16_000


def example(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Inputs that `model` takes, drawn with `seed`: the tensor that the class says is its main input, and what that needs.

    Raises: ConfigError for a main input that is not known here.
    """
    name = getattr(model, "main_input_name", "input_ids")
    make = INPUTS.get(name)
    if make is None:
        raise ConfigError(f"no input {name!r} can be made here", where=type(model).__name__, fix=f"Known: {', '.join(INPUTS)}")
    g = torch.Generator().manual_seed(seed)
    inputs = {name: make(model.config, g)}
    if name == "input_ids":
        inputs["attention_mask"] = torch.ones_like(inputs[name])
    if getattr(model.config, "is_encoder_decoder", False) and type(model).__name__.endswith("ForConditionalGeneration"):
        inputs["decoder_input_ids"] = _tokens(model.config, g)
    if name == "input_ids" and hasattr(model.config, "vision_config"):
        inputs["pixel_values"] = _image(model.config, g)
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in inputs.items()}


def _tokens(config: Any, g: torch.Generator) -> Tensor:
    text = config.get_text_config()
    pad, end = (getattr(text, k, None) for k in ("pad_token_id", "eos_token_id"))
    special = [s for s in (pad, end) if isinstance(s, int) and s < text.vocab_size // 2]
    length = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(max(special, default=0) + 1, text.vocab_size, (ROWS, length), generator=g)
    if isinstance(end, int) and end < text.vocab_size:
        ids[:, -1] = end  # where some classifiers read
    return ids


def _image(config: Any, g: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(ROWS, getattr(config, "num_channels", 3), height, width, generator=g)


INPUTS: dict[str, Callable[[Any, torch.Generator], Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _image,
    "input_values": lambda config, g: torch.randn(ROWS, SAMPLES, generator=g),
    "input_features": lambda config, g: torch.randn(ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=g),
}
