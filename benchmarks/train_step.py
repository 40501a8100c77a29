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
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    """One arm: build, warm up, then a block for every line read."""
    import torch

    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision("high")
    gpu = a.device != "cpu"
    model, optimizer = build(a)
    words, batch, length = SIZES[a.size][6:]
    g = torch.Generator().manual_seed(1)
    data = [torch.randint(0, words, (batch, length), generator=g).to(a.device) for _ in range(4)]
    done = 0

    def step() -> Any:
        nonlocal done
        ids = data[done % len(data)]
        done += 1
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    t = time.perf_counter()
    losses = [step().item() for _ in range(a.warmup)]
    wait()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({"ready": a.arm, "warmup_s": round(time.perf_counter() - t, 1), "losses": losses, "trained": trained}), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"profile": profile(step)}), flush=True)
            continue
        if line.strip() != "go":
            break
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        step()
        wait()
        t = time.perf_counter()
        for _ in range(a.steps):
            loss = step()
        wait()
        seconds = (time.perf_counter() - t) / a.steps
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        print(json.dumps({"seconds": seconds, "tokens_s": batch * length / seconds, "peak_gib": peak, "loss": loss.item()}), flush=True)


def profile(step: Any) -> list[Any]:
    """Where a step's device time goes: [kernel, calls, milliseconds], the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        step()
    rows = [(e.key[:110], e.count, e.self_device_time_total / 1e3) for e in p.key_averages() if e.device_type.name == "CUDA"]
    return sorted(rows, key=lambda r: -r[2])[:40]


class Arm:
    """A worker process."""

    def __init__(self, name: str, argv: list[str], log: Path) -> None:
        self.name, self.blocks = name, []
        self.log = log / f"{name.replace(':', '_')}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--arm", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.log, "w"), text=True
        )
        self.ready: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def ask(self, word: str = "go") -> dict[str, Any] | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.read()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def versions(device: str) -> dict[str, Any]:
    import importlib.metadata as metadata

    out: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "liger-kernel"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device == "cpu":
        return {**out, "device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return {**out, "device": subprocess.run(query, capture_output=True, text=True).stdout.strip()}


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
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    info = {"benchmark": "train_step", **{k: getattr(a, k) for k in keep}, **versions(a.device)}
    names = a.arms.split(",")
    done: list[Arm] = []
    with open(out / f"train_step_{a.size}_{a.method}.jsonl", "a") as f:
        for group in groups(names, a):
            arms = [Arm(n, argv, out) for n in group]  # all start, and compile, at once
            for arm in arms:
                arm.ready = arm.read()
                print(f"{arm.name}: {arm.ready or 'failed, see ' + str(arm.log)}", flush=True)
            for i in range(a.blocks):
                for arm in arms if i % 2 == 0 else reversed(arms):
                    got = arm.ask() if arm.ready else None
                    if got is not None:
                        arm.blocks.append(got)
                        f.write(json.dumps({**info, "arm": arm.name, "block": i, **got}) + "\n")
                        f.flush()
            for arm in arms:
                if arm.ready and arm.name in a.profile.split(","):
                    got = arm.ask("profile") or {}
                    (out / f"profile_{a.size}_{arm.name.replace(':', '_')}.json").write_text(json.dumps(got))
                    for key, count, ms in got.get("profile", [])[:25]:
                        print(f"  {ms:9.3f} ms {count:5d}  {key}")
                arm.close()
                if not arm.blocks:
                    print(f"--- {arm.name} failed:\n{arm.log.read_text()[-1500:]}")
            done += arms
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


def table(done: list[Arm], names: list[str], info: dict[str, Any]) -> None:
    print("\n" + json.dumps(info))
    rows: dict[str, list[dict[str, Any]]] = {}
    for arm in done:
        rows.setdefault(arm.name, []).extend(arm.blocks)
    speed = {n: statistics.median(b["tokens_s"] for b in blocks) for n, blocks in rows.items() if blocks}
    print(f"{'arm':<24}{'tokens/s':>10}{'min':>10}{'max':>10}{'ms/step':>9}{'peak GiB':>10}{'over floor':>12}{'x PEFT':>8}")
    for n in names:
        if n not in speed:
            print(f"{n:<24}    failed")
            continue
        blocks = rows[n]
        tokens = [b["tokens_s"] for b in blocks]
        floor = f"{100 * (speed['floor'] / speed[n] - 1):.1f}%" if "floor" in speed else ""
        peer = f"{speed[n] / speed['peft']:.2f}" if "peft" in speed else ""
        ms, peak = 1e3 * statistics.median(b["seconds"] for b in blocks), max(b["peak_gib"] for b in blocks)
        print(f"{n:<24}{speed[n]:>10,.0f}{min(tokens):>10,.0f}{max(tokens):>10,.0f}{ms:>9.1f}{peak:>10.2f}{floor:>12}{peer:>8}")


if __name__ == "__main__":
    main()
