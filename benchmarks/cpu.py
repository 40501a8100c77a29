"""Training on a small CPU beside the frozen base and beside PEFT: milliseconds a step, fp32, like for like.

    python benchmarks/cpu.py                       # two threads; give it a calm machine
    python benchmarks/cpu.py --model llama --arms floor,peft,veneer

models  minilm  BERT with the shape of MiniLM (6 layers of 384), 16 x 64 tokens, two labels
        llama   4 layers of 512, 4 x 64 tokens, 8,000 words
arms    floor         the frozen base, its own code, gradient down to the embeddings' output
        floor-loss    the same with veneer's loss without logits (llama)
        peft          Hugging Face PEFT, LoRA on all linears but the head
        veneer-plain  veneer.attach
        veneer        and veneer.optimize(compile=False)
Every arm is a process; they take turns. The classifier on top is frozen in every arm.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from arms import compete, serve, table, versions

SHAPES = {"minilm": (16, 64), "llama": (4, 64)}


def base(name: str) -> Any:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if name == "minilm":
        config: Any = tf.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
        return tf.BertForSequenceClassification(config)
    config = tf.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=8000, use_cache=False
    )
    return tf.LlamaForCausalLM(config)


def build(a: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    model = base(a.model).train()
    for m in model.modules():  # the base's own dropout would be most of what differs between runs
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    if a.arm.startswith("floor"):
        model.requires_grad_(False)
        if a.arm == "floor-loss":
            from veneer.head import fused_head

            fused_head(model, False)
        model.get_input_embeddings().register_forward_hook(lambda m, x, y: y.requires_grad_())
        return model, None
    if a.arm == "peft":
        import peft

        names = ["query", "key", "value", "dense"] if a.model == "minilm" else "all-linear"
        skip = ["pooler.dense"] if a.model == "minilm" else None
        model = peft.get_peft_model(model, peft.LoraConfig(r=a.r, lora_alpha=2 * a.r, target_modules=names, exclude_modules=skip))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    import veneer as vn

    vn.attach(model, vn.LoRA(a.r, at="attn.*,ffn.*"))
    if a.arm != "veneer-plain":
        vn.optimize(model, compile=False)
        return model, vn.adamw(model, lr=1e-4)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def worker(a: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(a.threads)
    torch.set_num_interop_threads(1)
    model, optimizer = build(a)
    batch, length = SHAPES[a.model]
    g = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        ids = torch.randint(5, 7000, (batch, length), generator=g)
        batches.append({"input_ids": ids, "labels": ids if a.model == "llama" else torch.randint(0, 2, (batch,), generator=g)})
    serve(a.arm, model, optimizer, batches, batch * length, a.steps, a.warmup, False)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="minilm", choices=SHAPES)
    p.add_argument("--arms", default="floor,peft,veneer-plain,veneer")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--blocks", type=int, default=9)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    p.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.arm:
        return worker(a)
    keep = ("model", "r", "threads", "steps", "warmup")
    argv = [v for k in keep for v in (f"--{k}", str(getattr(a, k)))]
    info = {"benchmark": "cpu", **{k: getattr(a, k) for k in keep}, **versions("cpu")}
    names = a.arms.split(",")
    table(compete([names], argv, info, Path(a.out), f"cpu_{a.model}", a.blocks, []), names, info)


if __name__ == "__main__":
    main()
