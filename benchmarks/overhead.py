"""What attaching costs: a disabled adapter against the plain base, attaching to a large model, and the import.

    python benchmarks/overhead.py            (seconds: --blocks N for more)

Two copies of one model run in turn, block after block, so that whatever else the machine does meets both alike; the
figure is the median of the blocks' ratios. Targets: disabled under 3%; attaching to an 8B shape under 2 s; import under
0.3 s. Each line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TARGETS = {"disabled": 1.03, "attach_s": 2.0, "import_s": 0.3}


def models() -> dict[str, Callable[[], Any]]:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    bert = BertConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024, vocab_size=2000)
    llama = LlamaConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=688, vocab_size=2000)
    return {"bert": lambda: BertForSequenceClassification(bert), "llama": lambda: LlamaForCausalLM(llama)}


def side_by_side(plain: Callable[[], None], other: Callable[[], None], blocks: int, each: int) -> tuple[float, float, float]:
    """The median ratio other / plain over `blocks`, and its quartiles; who goes first alternates."""
    for _ in range(3):
        plain()
        other()
    ratios = []
    for block in range(blocks):
        times = {}
        for which in (plain, other) if block % 2 else (other, plain):
            start = time.perf_counter()
            for _ in range(each):
                which()
            times[which] = time.perf_counter() - start
        ratios.append(times[other] / times[plain])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def disabled(blocks: int) -> None:
    """A LoRA on every linear map, a bottleneck and a prefix, attached and switched off, against the base."""
    import torch

    import veneer as vn

    for name, build in models().items():
        torch.manual_seed(0)
        base = build()
        other = build()
        other.load_state_dict(base.state_dict())
        vn.attach(other, vn.LoRA(8, at="linear") + vn.Bottleneck(16) + vn.Prefix(8))
        vn.activate(other, None)
        for p in other.parameters():
            p.requires_grad_(True)
        ids = torch.randint(0, 2000, (8, 64))

        def forward(model: Any, ids: Any = ids) -> None:
            with torch.no_grad():
                model(ids)

        def step(model: Any, ids: Any = ids) -> None:
            model.zero_grad(set_to_none=True)
            model(ids)[0].float().square().mean().backward()

        for what, run, train in (("forward", forward, False), ("forward+backward", step, True)):
            base.train(train)
            other.train(train)
            middle, low, high = side_by_side(lambda m=base, r=run: r(m), lambda m=other, r=run: r(m), blocks, 2)
            say("disabled", middle, model=name, what=what, quartiles=[round(low, 4), round(high, 4)], blocks=blocks)


def attaching(repeats: int = 5) -> None:
    """LoRA on every linear map of a model of Llama-3.1-8B's shape, on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import veneer as vn

    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, plan in (("lora-linear", vn.LoRA(8, at="linear")), ("unipelt-apl", vn.preset("unipelt-apl"))):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            vn.attach(model, plan)
            times.append(time.perf_counter() - start)
            vn.detach(model)
        say("attach_s", statistics.median(times), plan=name, slowest=round(max(times), 3))


def importing(repeats: int = 5) -> None:
    """`import veneer` in a fresh process, less the interpreter's own start."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    times = [run("import veneer") - run("pass") for _ in range(repeats)]
    say("import_s", max(0.0, statistics.median(times)))


def say(metric: str, value: float, **more: Any) -> None:
    print(json.dumps({"metric": metric, "value": round(value, 4), "target": TARGETS[metric], "met": value <= TARGETS[metric], **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of each comparison")
    blocks = parser.parse_args().blocks
    importing()
    attaching()
    disabled(blocks)


if __name__ == "__main__":
    main()
