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
       veneer-fp8     veneer.optimize(base_compute="fp8"); veneer-fp8-off with the original weights in CPU memory
       veneer-fp8-fused  the same with low-rank maps in one operation with the fp8 products (fuse=True)
       floor-fp8      the floor, with the frozen base in fp8
       veneer-low     veneer.optimize(memory="low"); veneer-low-fp8 with both; veneer-half: memory=0.5
       liger-peft     PEFT on a model with Liger's kernels and loss; liger-peft-bf16 with its adapter weights in bf16
       unsloth        Unsloth's LoRA, with no checkpointing; unsloth-low with its offloaded one (--packages: its unpacked wheels)
A name may carry another method, rank or dropout: veneer:ia3, peft:ia3, veneer:lora@r=64, peft:lora@dropout=0.05, …. BitFit's base has biases,
and floor:bitfit is the floor for it.

    python benchmarks/train_step.py --report results/*.jsonl       # one table of what several runs have written
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from arms import compete, report, serve, table, versions
from unsloth_arm import prepare, unsloth, written

SIZES = {  # hidden, inner, layers, heads, kv heads, head width, words, batch, tokens
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, 8, 1024),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, 4, 1024),
    "small": (512, 1408, 4, 8, 4, 64, 32000, 4, 256),
    "thin": (64, 128, 16, 4, 2, 16, 500, 2, 32),  # as many layers as 1b: what is launched counts, not what is computed
    "tiny": (64, 128, 2, 4, 2, 16, 500, 2, 32),
}
OPTIMIZE: dict[str, dict[str, Any]] = {  # of an arm's name, what vn.optimize is given
    "veneer": {"fuse": True},
    "veneer-bf16": {"fuse": True},
    "veneer-unfused": {"fuse": False},
    "veneer-fp8": {"base_compute": "fp8"},
    "veneer-fp8-fused": {"fuse": True, "base_compute": "fp8"},
    "veneer-fp8-off": {"base_compute": "fp8", "offload_base": True},
    "veneer-low": {"memory": "low"},
    "veneer-low-fp8": {"memory": "low", "base_compute": "fp8", "offload_base": True},
    "veneer-half": {"memory": 0.5},
    "veneer-fifth": {"memory": 0.2},
}
DEFAULT = "floor,peft,peft-compiled,veneer-plain,veneer-unfused,veneer"


def meaning(name: str, a: argparse.Namespace) -> tuple[str, str, int, float]:
    """Arm, method, rank and dropout of an arm's name."""
    arm, _, rest = name.partition(":")
    method, *options = rest.split("@")
    given = dict(o.split("=") for o in options)
    return arm, method or a.method, int(given.get("r", a.r)), float(given.get("dropout", a.dropout))


def plan_of(method: str, r: int, dropout: float) -> Any:
    import veneer as vn

    plans = {
        "lora": lambda: vn.LoRA(r, alpha=2 * r, dropout=dropout, at="linear"),
        "dora": lambda: vn.DoRA(r, alpha=2 * r, dropout=dropout, at="linear"),
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

    if method in ("lora", "dora"):
        return peft.LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=dropout, use_dora=method == "dora", target_modules="all-linear", task_type="CAUSAL_LM"
        )  # fmt: skip
    if method == "ia3":
        return peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    if method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    raise SystemExit(f"PEFT has no {method}")


class Floor:
    """Layers and loss as veneer.optimize has them, with nothing attached."""

    def __init__(self, model: Any, compile: dict[str, Any] | None, fp8: bool = False) -> None:
        from veneer.attach import state_of
        from veneer.frozen import FrozenBase
        from veneer.head import fused_head
        from veneer.optimize import layers

        model.requires_grad_(False)
        model.train()
        fused_head(model, compile is not None)
        if fp8:
            FrozenBase(model, state_of(model, create=True), offload=True)
        if compile is not None:
            for layer in layers(model):
                layer.compile(**compile)
        model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())


def build(a: argparse.Namespace, planner: Any = None) -> tuple[Any, Any]:
    """The model of one arm, and its optimiser (None for the floor). With a `planner` in the compiler's place it is not for running."""
    arm, method, r, dropout = meaning(a.arm, a)
    d, inner, n, heads, kv, width, words, _, length = SIZES[a.size]
    peer = prepare(a.packages) if arm.startswith("unsloth") else None  # before transformers

    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=n, num_attention_heads=heads, num_key_value_heads=kv, head_dim=width,
        vocab_size=words, max_position_embeddings=max(2048, length), tie_word_embeddings=False, use_cache=False,
        attention_bias=method == "bitfit", mlp_bias=method == "bitfit",
    )  # fmt: skip
    dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    if a.arm.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # its defaults: rope, norms, SwiGLU, and the loss without logits

    def base() -> Any:
        with torch.device(a.device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return transformers.LlamaForCausalLM(config).train()
            finally:
                torch.set_default_dtype(before)

    on_gpu = a.device != "cpu"
    if peer is not None:
        model = unsloth(peer, written(base, a.size), arm, r, dropout, length)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=on_gpu)
    model = base()
    compiler = {} if planner is None else {"backend": planner}
    compile = {"fullgraph": True, **compiler} if on_gpu or a.compile else None
    if arm.startswith("floor"):
        if arm != "floor-eager":
            Floor(model, compile, arm == "floor-fp8")
        else:
            model.requires_grad_(False)
            model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
        return model, None
    if arm.startswith(("peft", "liger")):
        import peft

        model = peft.get_peft_model(model, peft_of(method, r, dropout), autocast_adapter_dtype=not arm.endswith("bf16"))
        if arm == "peft-compiled":
            model.compile(**compiler)
        params = [p for p in model.parameters() if p.requires_grad]
        return model, None if planner is not None else torch.optim.AdamW(params, lr=1e-4, fused=on_gpu)
    import veneer as vn

    vn.attach(model, plan_of(method, r, dropout), dtype=torch.bfloat16 if arm == "veneer-bf16" else None)
    if arm != "veneer-plain":
        vn.optimize(model, **OPTIMIZE[arm], compile=False if compile is None else compile)
    return model, None if planner is not None else vn.adamw(model, lr=1e-4)


def estimated(a: argparse.Namespace) -> None:
    """What vn.estimate's ledger says of one arm, as a line of JSON: no GPU is needed for it."""
    import json
    from dataclasses import asdict

    import torch

    from veneer.estimate import step
    from veneer.simulate import Ledger, Planner

    a.device, planner = "meta", Planner(Ledger())
    model, _ = build(a, planner)
    words, batch, length = SIZES[a.size][6:]
    ids = torch.zeros(batch, length, dtype=torch.long)
    found = asdict(step(model, {"input_ids": ids, "labels": ids}, planner))
    print(json.dumps({"arm": a.arm, "size": a.size, "estimated_gib": round(found["peak"] / 2**30, 2), **found}), flush=True)


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
    p.add_argument("--seconds", type=float, default=None, help="end whatever still runs after these, and report what there is")
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    p.add_argument("--packages", default="", help="folder of unpacked wheels that the unsloth arms import")
    p.add_argument("--estimate", action="store_true", help="print the arms' estimated memory instead of running them")
    p.add_argument("--report", nargs="+", default=None, metavar="FILE", help="print a table of these files' lines instead of running")
    p.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.report:
        return report([Path(f) for f in a.report])
    if a.device is None:
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.arm:
        return estimated(a) if a.estimate else worker(a)
    if a.estimate:
        for name in a.arms.split(","):
            keep = [v for k in ("size", "method", "r", "dropout", "threads") for v in (f"--{k}", str(getattr(a, k)))]
            subprocess.run([sys.executable, __file__, *keep, "--estimate", "--arm", name])
        return None
    keep = ("size", "method", "r", "dropout", "device", "steps", "warmup", "threads", "packages")
    argv = [v for k in keep for v in (f"--{k}", str(getattr(a, k)))] + (["--compile"] if a.compile else [])
    info = {"benchmark": "train_step", **{k: getattr(a, k) for k in keep if k != "packages"}, **versions(a.device)}
    names = a.arms.split(",")
    done = compete(groups(names, a), argv, info, Path(a.out), f"train_step_{a.size}_{a.method}", a.blocks, a.profile.split(","), a.seconds)
    table(done, names, info)


def groups(names: list[str], a: argparse.Namespace) -> list[list[str]]:
    """The arms that take turns: as many together as the card's memory holds, by rough peaks in GiB. A floor that comes first is in each
    group, so that every arm has it beside itself."""
    if a.size not in ("1b", "8b"):
        return [names]
    big = a.size == "8b"
    first = [names[0]] if names[0].partition(":")[0] == "floor" else []
    out: list[tuple[float, list[str]]] = []
    for name in names[len(first) :]:
        arm = name.partition(":")[0]
        heavy = (36, 62) if arm in ("peft", "veneer-plain", "floor-eager") else (25, 47) if arm == "peft-compiled" else (14, 34)
        size = heavy[big]
        for i, (used, group) in enumerate(out):
            if used + size <= a.memory:
                group.append(name)
                out[i] = (used + size, group)
                break
        else:
            out.append((size + len(first) * (11, 28)[big], [*first, name]))
    return [g for _, g in out] or [names]


if __name__ == "__main__":
    main()
