"""Memory of sparse deltas against full fine-tuning and LoRA, measured: optimiser state, saved file, peak of a step.

    python benchmarks/sparse_memory.py                on the GPU where there is one, else on the CPU
    python benchmarks/sparse_memory.py --crossover    where gathering and the dense product take equal time (ops/sparse.py)

Each variant runs in a process of its own. Peak: on CUDA what torch allocated at most, less the model; on the CPU what the
process held at most (its resident set), less what it held before the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("full", "sparse 2%", "sparse 0.5%", "sparse 0.1%", "lora 8")
SIZES = {"cpu": (1024, 2816, 6, 4, 128), "cuda": (4096, 11008, 8, 4, 1024)}  # width, ffn, layers, batch, tokens
VOCAB = 8192
MB = 1e6


def resident(what: str) -> float:
    """VmRSS (now) or VmHWM (at most) in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return float(line.split()[1]) * 1024


def measure(variant: str, steps: int) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import veneer as vn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, ffn, layers, batch, tokens = SIZES[device]
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=width // 128, vocab_size=VOCAB)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    kind, _, amount = variant.partition(" ")
    if kind == "full":
        params = list(model.parameters())
    else:
        plan = vn.LoRA(int(amount), at="linear") if kind == "lora" else vn.Magnitude(float(amount.rstrip("%")) / 100)
        params = list(vn.attach(model, plan).parameters())
    optimiser = torch.optim.AdamW(params, lr=1e-5, foreach=False)
    ids = torch.randint(VOCAB, (batch, tokens), device=device)
    held = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    state = sum(t.numel() * t.element_size() for s in optimiser.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    if kind == "full":
        file = sum(p.numel() * p.element_size() for p in params)  # what save_pretrained writes
    else:
        with tempfile.TemporaryDirectory() as folder:
            vn.save(model, folder)
            file = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    return {
        "variant": variant, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "trained": sum(p.numel() for p in params),
        "state": state / MB, "file": file / MB, "peak": (peak - held) / MB, "ms": 1000 * min(times),
    }  # fmt: skip


def crossover() -> None:
    """Time of forward and backward of one map, both ways, by the share of its entries."""
    import torch

    from veneer.ops import sparse

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, tokens = (4096, 4096) if device == "cuda" else (1024, 512)
    x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32, requires_grad=True)
    print(f"{device}, {n} x {n}, {tokens} tokens: share, ms gathered, ms dense")
    for part in (4096, 2048, 1024, 512, 256, 128, 64):
        k = n * n // part
        v = torch.zeros(k, device=device, dtype=x.dtype, requires_grad=True)
        index = torch.randperm(n * n, device=device)[:k].sort().values.int()
        row = []
        for share in (1.0, 0.0):
            sparse.SHARE = share
            best = 1e9
            for _ in range(4):
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                sparse.sparse_product(x, v, index, n).sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
            row.append(1000 * best)
        print(f"1/{part:<5} {row[0]:9.2f} {row[1]:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--crossover", action="store_true")
    args = parser.parse_args()
    if args.crossover:
        return crossover()
    if args.variant:
        return print(json.dumps(measure(args.variant, args.steps)))
    print(f"{'variant':<12} {'trained':>13} {'state MB':>9} {'file MB':>9} {'peak MB':>9} {'ms/step':>9}")
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, __file__, "--variant", variant, "--steps", str(args.steps)], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{variant:<12} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{variant:<12} {r['trained']:>13,} {r['state']:>9.1f} {r['file']:>9.1f} {r['peak']:>9.1f} {r['ms']:>9.0f}", flush=True)
    print(r["device"])


if __name__ == "__main__":
    main()
