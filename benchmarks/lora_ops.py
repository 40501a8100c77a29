"""What single operations cost, and what other ways of writing them would: microseconds, the median of many.

    python benchmarks/lora_ops.py            # on a GPU; --device cpu --tokens 64 to see that it runs

Each line is one operation at one shape; `over base` is its share of the frozen map's own product in that direction.
The inputs rotate through several sets, so that the cache does not hold them.
"""

# ruff: noqa: B023  (the lambdas are called in the turn of the loop that makes them)
from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from veneer.ops import lora
from veneer.ops.loss import linear_cross_entropy, reference


def timed(fn: Callable[[int], Any], device: str, repeat: int) -> float:
    """Microseconds of fn(i), the median of `repeat` calls."""
    for i in range(5):
        fn(i)
    if device == "cpu":
        took = []
        for i in range(repeat):
            t = time.perf_counter()
            fn(i)
            took.append((time.perf_counter() - t) * 1e6)
        return statistics.median(took)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeat)]
    for i in range(repeat):
        marks[2 * i].record()
        fn(i)
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(repeat))


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--words", type=int, default=128256)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--repeat", type=int, default=40)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--inner", type=int, default=8192)
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    a = p.parse_args()
    dtype = torch.bfloat16 if a.device != "cpu" else torch.float32
    n, r, d, inner = a.tokens, a.r, a.hidden, a.inner
    rows = []

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=a.device, dtype=dtype) * 0.05

    def many(*shape: int) -> list[torch.Tensor]:
        return [new(*shape) for _ in range(3)]

    for inp, out in ((d, d), (d, d // 4), (d, inner), (inner, d)):
        xs, gs, w = many(n, inp), many(n, out), new(out, inp)
        A, B = new(r, inp), new(out, r)
        z, dz = new(n, r), new(n, r)
        ys, dxs = many(n, out), many(n, inp)
        wide, augmented = [torch.cat([x, z], 1) for x in xs], torch.cat([w, B], 1)
        taller = torch.cat([w, A], 0)
        forwards = {
            "base: x W'": lambda i: F.linear(xs[i % 3], w),
            "plain: x W' + s (x A') B'": lambda i: F.linear(xs[i % 3], w) + 2 * F.linear(F.linear(xs[i % 3], A), B),
            "ours: forward": lambda i: lora.forward(xs[i % 3], None, [w], [None], [A], [B], [2.0]),
            "  z = x A'": lambda i: xs[i % 3] @ A.t(),
            "  y += s z B'": lambda i: ys[i % 3].addmm_(z, B.t(), alpha=2.0),
            "other: z B' first, then += x W'": lambda i: (z @ B.t()).addmm_(xs[i % 3], w.t()),
            "other: [x z] [W B]'": lambda i: wide[i % 3] @ augmented.t(),
            "other: x [W; A]'": lambda i: xs[i % 3] @ taller.t(),
        }
        backwards = {
            "base: g W": lambda i: gs[i % 3] @ w,
            "ours: backward": lambda i: lora.backward([gs[i % 3]], xs[i % 3], z, [w], [A], [B], [2.0], False, True),
            "  dz = g B": lambda i: gs[i % 3] @ B,
            "  dB' = z' g": lambda i: z.t() @ gs[i % 3],
            "  dB = g' z": lambda i: gs[i % 3].t() @ z,
            "  dA = dz' x": lambda i: dz.t() @ xs[i % 3],
            "  dx += dz A": lambda i: dxs[i % 3].addmm_(dz, A),
        }
        for group in (forwards, backwards):
            base = None
            for name, fn in group.items():
                us = timed(fn, a.device, a.repeat)
                base = base or us
                rows.append({"in": inp, "out": out, "op": name, "us": us, "over": us / base})

    # three maps that share their input
    x, ws = many(n, d), [new(d, d), new(d // 4, d), new(d // 4, d)]
    As, Bs = [new(r, d) for _ in ws], [new(w.shape[0], r) for w in ws]
    gs3 = [new(n, w.shape[0]) for w in ws]
    z3, joined = new(n, 3 * r), torch.cat(ws)
    for name, fn in {
        "q k v: base, forward": lambda i: [F.linear(x[i % 3], w) for w in ws],
        "q k v: base as one product": lambda i: F.linear(x[i % 3], joined),
        "q k v: ours, forward": lambda i: lora.forward(x[i % 3], None, ws, [None] * 3, As, Bs, [2.0] * 3),
        "q k v: base, backward": lambda i: (gs3[0] @ ws[0]).addmm_(gs3[1], ws[1]).addmm_(gs3[2], ws[2]),
        "q k v: ours, backward": lambda i: lora.backward(gs3, x[i % 3], z3, ws, As, Bs, [2.0] * 3, False, True),
    }.items():
        rows.append({"in": d, "out": 0, "op": name, "us": timed(fn, a.device, a.repeat), "over": 0.0})

    h, head = new(n, d).requires_grad_(), new(a.words, d)
    labels = torch.randint(0, a.words, (n,), device=a.device)

    def whole(loss: torch.Tensor) -> None:
        loss.backward()
        h.grad = None

    few = max(3, a.repeat // 8)
    products = timed(lambda i: F.linear(h[:1024].detach(), head) @ head, a.device, few) * n / 1024
    rows.append({"in": d, "out": a.words, "op": "head: its two products", "us": products, "over": 1.0})
    for chunk in (512, 1024, 2048, 4096):
        for compile in (False, True) if a.device != "cpu" else (False,):
            us = timed(lambda i, c=chunk, k=compile: whole(linear_cross_entropy(h, head, None, labels, chunk=c, compile=k)), a.device, few)
            rows.append({"in": d, "out": a.words, "op": f"loss, chunks of {chunk}{', compiled' if compile else ''}", "us": us, "over": us / products})
    us = timed(lambda i: whole(reference(h, head, None, labels)), a.device, few)
    rows.append({"in": d, "out": a.words, "op": "loss, plain", "us": us, "over": us / products})

    path = Path(a.out)
    path.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if a.device != "cpu" else "cpu"
    with open(path / "lora_ops.jsonl", "a") as f:
        for row in rows:
            f.write(json.dumps({"benchmark": "lora_ops", "device": name, "torch": torch.__version__, "tokens": n, "r": r, **row}) + "\n")
    print(f"{name}, {n} tokens, r={r}")
    for row in rows:
        print(f"{row['in']:>6} -> {row['out']:<7}{row['op']:<36}{row['us']:>11.1f} us{row['over']:>8.3f}")


if __name__ == "__main__":
    main()
