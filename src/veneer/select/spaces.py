"""Spaces that have a name: AutoPEFT's, and a sensible one over the five families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import resolve


def _width(model: nn.Module) -> int:
    """The width of the model's blocks."""
    return max((s.width for s in resolve.sites(model) if s.port == "hidden"), default=0) or 768


def autopeft(model: nn.Module) -> dict[str, Any]:
    """AutoPEFT's space (Zhou et al., TACL 2024, arXiv 2301.12132): a serial and a parallel bottleneck adapter at the FFN and
    a prefix, each of a size of its own, 0 included, and every layer on or off for all three.

    The sizes are d / 2^k, down to 1, and 0: eleven on BERT-base (d = 768), so 11³ · 2¹² ≈ 5 million candidates, as in
    the paper.
    """
    d = _width(model)
    sizes = sorted({0, *(d >> k for k in range(d.bit_length()))})
    return {
        "parts": [
            {"method": "bottleneck", "size": sizes, "at": "ffn"},
            {"method": "bottleneck", "size": sizes, "at": "ffn", "parallel": True},
            {"method": "prefix", "length": sizes},
        ],
        "layers": "each",
    }


def default(model: nn.Module) -> dict[str, Any]:
    """One or several of the five families: reparameterisation (LoRA), additive (bottleneck), soft prompts (prefix), scaling
    ((IA)3), selective (BitFit); in all layers, the upper half or the upper third; with and without UniPELT's gates.

    Sizes are those of the methods' papers and UniPELT's. Learning rates are 1 to 10 times the methods' default, since the
    few steps of a search want more than a long run does (the demo's rates are 4 to 10 times)."""
    layers = 1 + max((s.layer for s in resolve.sites(model) if s.layer is not None), default=0)
    slices = list(dict.fromkeys([":", f"{layers // 2}:", f"{layers - layers // 3}:"])) if layers > 2 else [":"]
    return {
        "parts": [
            {"method": "lora", "r": [0, 2, 4, 8, 16], "at": ["attn.{q,v}", "linear"]},
            {"method": "bottleneck", "size": [0, 8, 16, 48, 96], "at": "ffn"},
            {"method": "prefix", "length": [0, 5, 10, 30]},
            {"method": "ia3", "optional": True},
            {"method": "bitfit", "optional": True},
        ],
        "layers": slices,
        "gated": [False, True],
        "rates": [1, 3, 10],
    }


def singles(model: nn.Module) -> dict[str, Any]:
    """Exactly one method, in the sizes of its paper: the methods beside each other, as in the demo."""
    return {
        "parts": [
            {"method": "lora", "r": [2, 4, 8, 16]},
            {"method": "ia3"},
            {"method": "bitfit"},
            {"method": "bottleneck", "size": [8, 16, 48, 96]},
            {"method": "prefix", "length": [5, 10, 30]},
            {"method": "prompt", "length": [10, 20]},
        ],
        "together": "one",
        "rates": [1, 3, 10],
    }


NAMED: dict[str, Callable[[nn.Module], dict[str, Any]]] = {"default": default, "autopeft": autopeft, "singles": singles}
