"""What is to be timed on a GPU next, as one command with a limit: many adapters in one batch, the fp8 base, and whole training
steps of every family.

    python benchmarks/job.py --seconds 540
    python benchmarks/job.py --seconds 300 --size tiny --device cpu --threads 1 --adapters 4 --batch 4 --length 8 --tokens 4   # does it run?

Each part is a benchmark of its own with what is left of the time; the ones that matter most come first. Their JSON lines lie in
--out ($OUT or results/ otherwise), beside job.jsonl, which says of each part how long it took and how it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def parts(a: argparse.Namespace) -> dict[str, tuple[float, list[str]]]:
    """Of each part, its share of the time and its command."""
    same = ["--size", a.size, "--threads", str(a.threads), "--out", a.out] + (["--device", a.device] if a.device else [])
    many = [str(HERE / "many_adapters.py"), *same, "--repeat", str(a.repeat)]
    many += [v for k in ("adapters", "batch", "length", "tokens") for v in (f"--{k}", str(getattr(a, k)))]
    step = [str(HERE / "train_step.py"), *same, "--blocks", str(a.repeat), "--steps", "3", "--memory", "76"]
    families = "floor," + ",".join(f"veneer:{m}" for m in ("unipelt-apl", "dora", "ia3", "bottleneck", "prefix", "prompt"))
    settings = ("lora@r=8", "lora@r=64", "lora@dropout=0.05")
    return {
        "mixed training": (0.25, [*many, "--arms", "train-pair"]),
        "prefill and eager decoding": (0.15, [*many, "--arms", "pair"]),
        "decoding as a graph": (0.2, [*many, "--arms", "base-graph,veneer-graph", "--together"]),
        "fp8": (0.25, [*step, "--arms", "floor,veneer-fp8,veneer-fp8-fused"]),
        "mixed training, shuffled": (0.15, [*many, "--arms", "train-pair", "--shuffle"]),
        "families": (0.3, [*step, "--arms", families]),
        "bitfit": (0.1, [*step, "--arms", "floor:bitfit,veneer:bitfit"]),
        "ranks and dropout": (0.3, [*step, "--arms", "floor," + ",".join(f"{arm}:{m}" for m in settings for arm in ("veneer", "peft-compiled"))]),
        "peers": (0.3, [*step, "--arms", "floor,veneer,veneer-low,peft-compiled,peft,peft:dora,liger-peft,liger-peft-bf16"]),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=540)
    p.add_argument("--size", default="1b")
    p.add_argument("--device", default="")
    p.add_argument("--threads", type=int, default=8)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--adapters", type=int, default=32)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--parts", default="", help="a part of the names of those to run, by commas")
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    a = p.parse_args()
    start, chosen = time.monotonic(), {k: v for k, v in parts(a).items() if not a.parts or any(w.strip() in k for w in a.parts.split(","))}
    Path(a.out).mkdir(parents=True, exist_ok=True)
    shares = sum(share for share, _ in chosen.values())
    with open(Path(a.out) / "job.jsonl", "a") as f:
        for name, (share, command) in chosen.items():
            left = a.seconds - (time.monotonic() - start)
            limit = max(1.0, left * share / shares)  # what a part does not use is the next one's
            shares -= share
            print(f"=== {name}: at most {limit:.0f} s", flush=True)
            began = time.monotonic()
            own = ["--seconds" if "train_step" in command[0] else "--limit", str(int(limit))]
            try:
                code = subprocess.run([sys.executable, *command, *own], timeout=limit + 15).returncode
            except subprocess.TimeoutExpired:
                code = -1
            f.write(json.dumps({"part": name, "seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1), "code": code}) + "\n")
            f.flush()


if __name__ == "__main__":
    main()
