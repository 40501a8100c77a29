"""Training on a small CPU beside the frozen base and beside PEFT, fp32, like for like.

    python benchmarks/cpu.py                                            # two threads; give it a calm machine
    python benchmarks/cpu.py --model llama --threads 1 --rounds 40
    python benchmarks/cpu.py --arms floor,veneer,veneer:dora,peft:dora  # other methods: those of train_step.py

models  minilm  BERT with the shape of MiniLM (6 layers of 384), 16 x 64 tokens, two labels
        llama   4 layers of 512, 4 x 64 tokens, 8,000 words
arms    floor         the frozen base, its own code, gradient down to the embeddings' output
        floor-loss    the same with veneer's loss without logits (llama)
        peft          Hugging Face PEFT, LoRA on all linears but the head
        veneer-plain  veneer.attach
        veneer        and veneer.optimize(compile=False)
All arms are in one process and take turns, a step each. A figure is the median over the rounds of its ratio to the other arm in the same
round: of the process's CPU time, which other work on the machine hardly changes, and of wall time. Every arm's optimiser is torch's fused
AdamW; the classifier on top is frozen in every arm. JSON lines go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import versions
from train_step import peft_of, plan_of

SHAPES = {"minilm": (16, 64), "llama": (4, 64)}
NAMES = ("query", "key", "value", "dense")


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


def build(arm: str, a: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    arm, _, method = arm.partition(":")
    method = method or "lora"
    model = base(a.model).train()
    for m in model.modules():  # the base's own dropout would be most of what differs between runs
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    if arm.startswith("floor"):
        model.requires_grad_(False)
        if arm == "floor-loss":
            from veneer.head import fused_head

            fused_head(model, False)
        model.get_input_embeddings().register_forward_hook(lambda m, x, y: y.requires_grad_())
        return model, None
    if arm == "peft":
        import peft

        config = peft_of(method, a.r, a.dropout)
        if a.model == "minilm":
            config.task_type = None
            if hasattr(config, "target_modules"):
                config.target_modules, config.exclude_modules = set(NAMES), {"pooler.dense"}
        model = peft.get_peft_model(model, config)
    else:
        import veneer as vn

        lora = {"lora": vn.LoRA, "dora": vn.DoRA}.get(method)
        at = "attn.*,ffn.*"  # without BERT's pooler
        vn.attach(model, lora(a.r, alpha=2 * a.r, dropout=a.dropout, at=at) if lora else plan_of(method, a.r, a.dropout))
        if arm != "veneer-plain":
            vn.optimize(model, compile=False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def step_of(arm: str, a: argparse.Namespace) -> Callable[[], Any]:
    import torch

    model, optimizer = build(arm, a)
    batch, length = SHAPES[a.model]
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 7000, (batch, length), generator=g)
    inputs = {"input_ids": ids, "labels": ids if a.model == "llama" else torch.randint(0, 2, (batch,), generator=g)}

    def step() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def rounds(steps: dict[str, Callable[[], Any]], n: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, seconds) of every arm's step in each round."""
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in range(n):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name]()
            out[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return out


def ratio(a: list[tuple[float, float]], b: list[tuple[float, float]], which: int) -> float:
    return statistics.median(x[which] / y[which] for x, y in zip(a, b, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="minilm", choices=SHAPES)
    p.add_argument("--arms", default="floor,peft,veneer-plain,veneer")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    a = p.parse_args()

    import torch

    torch.set_num_threads(a.threads)
    torch.set_num_interop_threads(1)
    steps = {name: step_of(name, a) for name in a.arms.split(",")}
    rounds(steps, 3)
    done = rounds(steps, a.rounds)
    info = {"benchmark": "cpu", **{k: getattr(a, k) for k in ("model", "r", "dropout", "threads", "rounds")}, **versions("cpu")}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(info))
    print(f"{'arm':<24}{'CPU ms':>8}{'ms':>8}{'over floor: CPU':>17}{'wall':>8}{'x PEFT: CPU':>13}{'wall':>7}")
    with open(out / f"cpu_{a.model}.jsonl", "a") as f:
        for name, times in done.items():
            row = f"{name:<24}{1e3 * statistics.median(t for t, _ in times):>8.1f}{1e3 * statistics.median(t for _, t in times):>8.1f}"
            if "floor" in done:
                row += f"{100 * (ratio(times, done['floor'], 0) - 1):>16.1f}%{100 * (ratio(times, done['floor'], 1) - 1):>7.1f}%"
            method = name.partition(":")[2]
            peer = f"peft:{method}" if method else "peft"
            if peer in done:
                row += f"{ratio(done[peer], times, 0):>13.2f}{ratio(done[peer], times, 1):>7.2f}"
            print(row)
            f.write(json.dumps({**info, "arm": name, "cpu_s": [t for t, _ in times], "wall_s": [t for _, t in times]}) + "\n")


if __name__ == "__main__":
    main()
