"""Positions: which tokens a method acts on, and what it takes for a sequence to start at position n in place of 0."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, PlanError
from ..sites import Site


class Places:
    """Which tokens of a sequence are meant: 'all', 'first:4', 'last:1', 'first:4+last:4'.

    Only real tokens count, so that padding on either side changes nothing; a sequence shorter than that is taken whole,
    each token once. Where the lengths of the prompts are known (vn.prompted), 'last' counts back from the prompt's end; while
    decoding from a cache nothing more is chosen. Raises: PlanError for another form.
    """

    def __init__(self, text: str) -> None:
        parts = str(text).split("+")
        found = [re.fullmatch(r"(first|last):([1-9]\d{0,5})", p.strip()) for p in parts]
        named = [m.group(1) for m in found if m]
        self.everywhere = text == "all"
        if not self.everywhere and (len(named) != len(parts) or len(set(named)) != len(named)):
            raise PlanError(f"positions={text!r}", fix="Write 'all', 'first:4', 'last:4' or 'first:4+last:4'")
        counts = {m.group(1): int(m.group(2)) for m in found if m}
        self.first, self.last = counts.get("first", 0), counts.get("last", 0)

    def __call__(self, tokens: int, mask: Tensor | None, prompt: Tensor | None, past: int, state: Tensor) -> Tensor:
        """1 for a chosen token of `state` (B, T, d), 0 for another: (B, T), in its dtype."""
        if state.dim() != 3:
            raise CapabilityError(f"positions are those of a sequence, and here is a state of shape {tuple(state.shape)}", fix="Use positions='all'")
        batch = state.numel() // (tokens * state.shape[-1])
        if past:
            return state.new_zeros(batch, tokens)
        if mask is None or mask.shape != (batch, tokens):
            mask = torch.ones(batch, tokens, dtype=torch.long, device=state.device)
        count = mask.long().cumsum(1)
        total = count[:, -1:]
        if prompt is not None:
            total = torch.minimum(total, prompt.to(count)[:, None].repeat_interleave(batch // prompt.shape[0], 0))
        chosen = (count <= self.first) | ((count > total - self.last) & (count <= total))
        return (chosen & (mask != 0)).to(state.dtype)


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
