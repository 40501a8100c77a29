"""The contract suite's table of methods beyond the core's: one line each, run on five representative kinds of model.

A covering design keeps the suite affordable: every method on these kinds, every kind of model on the core's methods.
"""

from __future__ import annotations

import veneer as vn

# an encoder, a decoder with grouped queries, one with fused qkv, an encoder-decoder, a vision encoder
REPRESENTATIVE = ("bert", "llama", "gpt2", "t5", "vit")

CATALOGUE = {
    "last-layer": lambda: vn.Full(at="ffn.*@-1:"),
}

# why a method refuses a kind of model: a part of the error's text
REFUSALS: dict[str, str] = {}
