"""How far two models' outputs lie apart: every file that is written for another reader is measured with this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import disabled
from ..errors import ConfigError, MergeError

ROWS, TOKENS, SAMPLES = 2, 16, 16_000


@dataclass
class Difference:
    """|a - b| of two outputs on the same input.

    largest   max |a - b|
    relative  ‖a - b‖ / ‖a‖
    agree     share of positions whose largest entry is the same
    effect    max |a - base|: what the adapter itself does to the output; None where the base's was not given
    """

    largest: float
    relative: float
    agree: float
    effect: float | None = None

    def __str__(self) -> str:
        own = "" if self.effect is None else f"; the adapter itself changes it by up to {self.effect:.3g}"
        return f"output differs by at most {self.largest:.3g} (relative {self.relative:.2g}, same top entry at {100 * self.agree:.1f}%){own}"


def difference(a: Tensor, b: Tensor, base: Tensor | None = None) -> Difference:
    """How `b` differs from `a`. Raises: MergeError where they have not the same shape, or one is not a number."""
    if a.shape != b.shape:
        raise MergeError(f"the outputs have shapes {list(a.shape)} and {list(b.shape)}", fix="They are not of the same model")
    a, b = a.double(), b.double()
    if not torch.isfinite(a).all() or not torch.isfinite(b).all():
        raise MergeError("the output has NaN or infinity", fix="Train again, or take an earlier checkpoint")
    return Difference(
        float((a - b).abs().max()),
        float((a - b).norm() / a.norm().clamp(min=1e-30)),
        float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        None if base is None else float((a - base.double()).abs().max()),
    )


def probe(model: Any, seed: int = 0) -> dict[str, Tensor]:
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


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the last hidden state where there is no head, in eval mode."""
    before = model.training
    try:
        out = model.eval()(**inputs)
    finally:
        model.train(before)
    for key in ("logits", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out[0]


def with_and_without(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output with the active adapters, and the base's."""
    adapted = output(model, inputs)
    with disabled(model):
        return adapted, output(model, inputs)
