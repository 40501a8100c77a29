"""Positions: what it takes for a sequence to start at position n in place of 0, in models of either kind."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site


def rotation(model: nn.Module, attention: nn.Module, width: int, n: int) -> Tensor | None:
    """M (width, width) with k M as seen from position i what k is from position i + n; None where nothing rotates.

    Rotary attention scores R(i + n) q against k, which is R(i) q against R(-n) k: a matrix of its own family's rotation.
    """
    rotary = next((m for m in model.modules() if "inv_freq" in m._buffers or any(b.endswith("_inv_freq") for b in m._buffers)), None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None
    device = next(b.device for k, b in rotary._buffers.items() if b is not None and k.endswith("inv_freq"))
    eye = torch.eye(width, device=device)[None, None]
    given: dict[str, Any] = {"position_ids": torch.full((1, width), n, device=device)}
    if "layer_type" in inspect.signature(inspect.unwrap(type(rotary).forward)).parameters:
        given["layer_type"] = getattr(attention, "layer_type", None) or ("sliding_attention" if getattr(attention, "is_sliding", False) else "full_attention")
    with torch.no_grad():
        cos, sin = rotary(eye, **given)
        size = (cos**2 + sin**2).sqrt()  # some scale their rotation; a key that is not rotated is not scaled
        return apply(eye, eye, cos / size, -sin / size)[1][0, 0]


def tables(model: nn.Module, maps: list[Site]) -> list[str]:
    """The modules among `maps` that hold a learnt vector for each absolute position."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return []
    # OPT and BART keep up to two rows more than they have positions
    return [s.path for s in maps if s.kind == "embedding" and s.role != "embed" and 0 <= s.inp - most <= 2]
