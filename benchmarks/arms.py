"""Arms that take turns: what the benchmarks of training share. Each arm is a process that waits for its next block."""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(arm: str, model: Any, optimizer: Any, batches: list[dict[str, Any]], tokens: int, steps: int, warmup: int, gpu: bool) -> None:
    """The arm's side: warm up, then a block of training steps for every 'go' that is read."""
    import torch

    done = 0

    def step() -> Any:
        nonlocal done
        loss = model(**batches[done % len(batches)]).loss
        done += 1
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    t = time.perf_counter()
    losses = [step().item() for _ in range(warmup)]
    wait()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({"ready": arm, "warmup_s": round(time.perf_counter() - t, 1), "losses": losses, "trained": trained}), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"profile": profile(step)}), flush=True)
            continue
        if line.strip() != "go":
            break
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        loss = step()
        wait()
        t = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        seconds = (time.perf_counter() - t) / steps
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        print(json.dumps({"seconds": seconds, "tokens_s": tokens / seconds, "peak_gib": peak, "loss": loss.item()}), flush=True)


def profile(step: Callable[[], Any]) -> list[Any]:
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
        self.log = log / f"{name.translate(str.maketrans(':@=', '___'))}.log"
        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], *argv, "--arm", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.log, "w"), text=True
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
            with contextlib.suppress(BrokenPipeError):  # it was ended, with a word in the pipe
                self.process.stdin.close()
        self.process.wait()


def versions(device: str) -> dict[str, Any]:
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


def compete(
    sets: list[list[str]], argv: list[str], info: dict[str, Any], out: Path, name: str, blocks: int, profiles: list[str], seconds: float | None = None
) -> list[Arm]:
    """Run the arms of each set side by side, block by block in turn; write every block to `out`; return the arms.

    seconds  after these, whatever still runs is ended, and what there is counts
    """
    out.mkdir(parents=True, exist_ok=True)
    done: list[Arm] = []
    running: list[Arm] = []
    ended = threading.Event()

    def end() -> None:
        ended.set()
        for arm in running:
            arm.process.kill()

    clock = threading.Timer(seconds or threading.TIMEOUT_MAX, end)
    clock.daemon = True
    clock.start()
    with open(out / f"{name}.jsonl", "a") as f:
        for group, names in enumerate(sets):
            if ended.is_set():
                break
            arms = [Arm(n, argv, out) for n in names]  # all start, and compile, at once
            running[:] = arms
            for arm in arms:
                arm.ready = arm.read()
                print(f"{arm.name}: {arm.ready or 'failed, see ' + str(arm.log)}", flush=True)
            for i in range(blocks):
                for arm in arms if i % 2 == 0 else reversed(arms):
                    got = arm.ask() if arm.ready else None
                    if got is not None:
                        arm.blocks.append(got)
                        f.write(json.dumps({**info, "arm": arm.name, "group": group, "block": i, **got}) + "\n")
                        f.flush()
            for arm in arms:
                if arm.ready and arm.name in profiles:
                    got = arm.ask("profile") or {}
                    (out / f"profile_{name}_{arm.log.stem}.json").write_text(json.dumps(got))
                    print(f"--- kernels of {arm.name}")
                    for key, count, ms in got.get("profile", [])[:25]:
                        print(f"  {ms:9.3f} ms {count:5d}  {key}")
                arm.close()
                if not arm.blocks:
                    print(f"--- {arm.name} failed:\n{arm.log.read_text()[-1500:]}")
            done += arms
    clock.cancel()
    return done


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


def report(files: list[Path]) -> None:
    """One table of the lines that several runs have written: an arm's median beside the floor's and PEFT's of its own run and group."""
    found: dict[Any, dict[str, list[dict[str, Any]]]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if "tokens_s" in row:
                key = tuple(str(row.get(k, "")) for k in ("size", "method", "r", "dropout", "torch", "device", "group"))
                found.setdefault((str(file), *key), {}).setdefault(row["arm"], []).append(row)
    print(f"{'size':<6}{'arm':<32}{'blocks':>7}{'tokens/s':>10}{'peak GiB':>10}{'over floor':>12}{'x PEFT':>8}")
    for (_, size, *_), arms in sorted(found.items()):
        speed = {n: statistics.median(b["tokens_s"] for b in blocks) for n, blocks in arms.items()}
        for name, blocks in arms.items():
            method = name.partition(":")[2]
            floor = speed.get(f"floor:{method}", speed.get("floor"))
            peer = speed.get(f"peft:{method}" if method else "peft")
            over, times = f"{100 * (floor / speed[name] - 1):.1f}%" if floor else "", f"{speed[name] / peer:.2f}" if peer else ""
            print(f"{size:<6}{name:<32}{len(blocks):>7}{speed[name]:>10,.0f}{max(b['peak_gib'] for b in blocks):>10.2f}{over:>12}{times:>8}")
