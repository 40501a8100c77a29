"""What the backward pass keeps in memory: a ladder beside the base, and methods inside it, on the same batch.

Every tensor that autograd saves in one forward pass is counted once (parameters and buffers are not); no device's allocator
comes into it, so the figures are the same on any machine.   python benchmarks/ladder_memory.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer as vn

SHAPE = dict(vocab_size=4096, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1536)
BATCH, LENGTH = 4, 256
PLANS = {
    "ladder": lambda: vn.Ladder(),
    "lora": lambda: vn.LoRA(8),
    "bottleneck": lambda: vn.Bottleneck(48),
    "loreft": lambda: vn.LoReFT(8),
    "bottleneck, 6 layers dropped": lambda: vn.Bottleneck(48, skip=6),
}


def kept(plan: vn.Plan) -> tuple[int, int]:
    """(bytes saved for the backward pass, trainable parameters)"""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    adapter = vn.attach(model, plan)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    held = []

    def see(t: torch.Tensor) -> torch.Tensor:
        held.append(t)  # so that no address is used again
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(seen.values()), adapter.num_parameters


if __name__ == "__main__":
    print(f"{'plan':<32}{'kept for backward':>20}{'parameters':>14}")
    for name, make in PLANS.items():
        size, parameters = kept(make())
        print(f"{name:<32}{size / 2**20:>16.0f} MiB{parameters:>14,}")
