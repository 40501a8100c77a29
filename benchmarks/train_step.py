"""Training speed beside peers and beside the frozen base: tokens a second and peak memory of whole training steps.

    python benchmarks/train_step.py --size 1b
    python benchmarks/train_step.py --size 8b --arms floor,peft,peft-compiled,veneer --method lora
    python benchmarks/train_step.py --size tiny --device cpu --blocks 2 --steps 2     # does it run?

Every arm is a process of its own (a peer may patch the modules it trains), builds the same randomly initialised model
and waits; then the arms take turns, a block of steps each, so that a change in the card's clock meets them all. The
figure of an arm is the median of its blocks. JSON lines go to --out ($OUT or results/ otherwise), the table comes last.

arms   floor          the frozen base with compiled layers and the fused loss, gradient down to the embeddings' output
       floor-eager    the frozen base, eager, its own loss
       peft           Hugging Face PEFT as it comes
       peft-compiled  the same with torch.compile
       veneer-plain   veneer.attach
       veneer         and veneer.optimize
       veneer-unfused veneer.optimize(fuse=False): what the compiler makes of the plain rule
       veneer-bf16    veneer with adapter weights in bf16 (no fp32 masters: for the cost of the casts)
A name may carry another method: veneer:ia3, peft:ia3, veneer:bottleneck, ….
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from arms import compete, serve, table, versions

SIZES = {  # hidden, inner, layers, heads, kv heads, head width, words, batch, tokens
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, 8, 1024),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, 4, 1024),
    "small": (512, 1408, 4, 8, 4, 64, 32000, 4, 256),
    "tiny": (64, 128, 2, 4, 2, 16, 500, 2, 32),
}
DEFAULT = "floor,peft,peft-compiled,veneer-plain,veneer-unfused,veneer"


def plan_of(method: str, r: int, dropout: float) -> Any:
    import veneer as vn

    plans = {
        "lora": lambda: vn.LoRA(r, alpha=2 * r, dropout=dropout, at="linear"),
        "ia3": vn.IA3,
        "bitfit": vn.BitFit,
        "bottleneck": lambda: vn.Bottleneck(64),
        "prefix": lambda: vn.Prefix(10),
        "prompt": lambda: vn.PromptTuning(10),
        "unipelt-apl": lambda: vn.preset("unipelt-apl"),
    }
    return plans[method]()


def peft_of(method: str, r: int, dropout: float) -> Any:
    import peft

    if method == "lora":
        return peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    if method == "ia3":
        return peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    if method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    raise SystemExit(f"PEFT has no {method}")


class Floor:
    """Layers and loss as veneer.optimize has them, with nothing attached."""

    def __init__(self, model: Any, compile: bool) -> None:
        from veneer.head import fused_head
        from veneer.optimize import layers

        model.requires_grad_(False)
        model.train()
        fused_head(model, compile)
        if compile:
            for layer in layers(model):
                layer.compile(fullgraph=True)
        model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())


def build(a: argparse.Namespace) -> tuple[Any, Any]:
    """The model of one arm, and its optimiser (None for the floor)."""
    import torch
    import transformers

    d, inner, n, heads, kv, width, words, _, length = SIZES[a.size]
    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=n, num_attention_heads=heads, num_key_value_heads=kv, head_dim=width,
        vocab_size=words, max_position_embeddings=max(2048, length), tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(a.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    model.train()
    arm, _, method = a.arm.partition(":")
    method = method or a.method
    on_gpu = a.device != "cpu"
    if arm.startswith("floor"):
        Floor(model, arm == "floor") if arm == "floor" else model.requires_grad_(False)
        if arm != "floor":
            model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
        return model, None
    if arm.startswith("peft"):
        import peft

        model = peft.get_peft_model(model, peft_of(method, a.r, a.dropout))
        if arm == "peft-compiled":
            model.compile()
        params = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(params, lr=1e-4, fused=on_gpu)
    import veneer as vn

    vn.attach(model, plan_of(method, a.r, a.dropout), dtype=torch.bfloat16 if arm == "veneer-bf16" else None)
    if arm != "veneer-plain":
        vn.optimize(model, fuse=arm != "veneer-unfused", compile={"fullgraph": True} if on_gpu or a.compile else False)
    return model, vn.adamw(model, lr=1e-4)


def worker(a: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision("high")
    model, optimizer = build(a)
    words, batch, length = SIZES[a.size][6:]
    g = torch.Generator().manual_seed(1)
    data = [torch.randint(0, words, (batch, length), generator=g).to(a.device) for _ in range(4)]
    serve(a.arm, model, optimizer, [{"input_ids": ids, "labels": ids} for ids in data], batch * length, a.steps, a.warmup, a.device != "cpu")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="tiny", choices=SIZES)
    p.add_argument("--arms", default=DEFAULT)
    p.add_argument("--method", default="lora")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--device", default=None)
    p.add_argument("--blocks", type=int, default=5)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--compile", action="store_true", help="compile on a CPU too")
    p.add_argument("--profile", default="", help="arms whose kernels to list after the blocks")
    p.add_argument("--memory", type=float, default=70, help="GiB of the card that arms running side by side may take")
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    p.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.device is None:
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.arm:
        return worker(a)
    keep = ("size", "method", "r", "dropout", "device", "steps", "warmup", "threads")
    argv = [v for k in keep for v in (f"--{k}", str(getattr(a, k)))] + (["--compile"] if a.compile else [])
    info = {"benchmark": "train_step", **{k: getattr(a, k) for k in keep}, **versions(a.device)}
    names = a.arms.split(",")
    done = compete(groups(names, a), argv, info, Path(a.out), f"train_step_{a.size}_{a.method}", a.blocks, a.profile.split(","))
    table(done, names, info)


def groups(names: list[str], a: argparse.Namespace) -> list[list[str]]:
    """The arms that take turns: as many together as the card's memory holds, by rough peaks in GiB."""
    if a.size not in ("1b", "8b"):
        return [names]
    out: list[tuple[float, list[str]]] = []
    for name in names:
        arm = name.partition(":")[0]
        heavy = (36, 62) if arm in ("peft", "veneer-plain", "floor-eager") else (25, 47) if arm == "peft-compiled" else (14, 34)
        size = heavy[a.size == "8b"]
        for i, (used, group) in enumerate(out):
            if used + size <= a.memory:
                group.append(name)
                out[i] = (used + size, group)
                break
        else:
            out.append((size, [name]))
    return [g for _, g in out]


if __name__ == "__main__":
    main()
