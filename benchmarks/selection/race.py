"""Racing K candidates together against the same K one after the other: seconds, and whether each ends with the same weights.

    python benchmarks/selection/race.py                                   (MiniLM and tweets; CPU)
    python benchmarks/selection/race.py --device cuda --shape 135m        (random Llama shapes: 135m, 360m, 1b)

Both arms run the same code on the same examples (`vn.select`'s race; a race of one is a run alone), each arm is measured after a
warm-up of its own, and who goes first alternates over `--repeats`. Lines of the output are JSON objects. Needs torch, transformers
and veneer; MiniLM and its tweets come with veneer[demo], or from the folder that prepare.py writes (--data).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, layers, heads, key/value heads, inner
    "135m": (576, 30, 9, 3, 1536),
    "360m": (960, 32, 15, 5, 2560),
    "1b": (2048, 16, 32, 8, 8192),
}


def candidates(task: str) -> dict[str, Any]:
    """Eight plans of all kinds; a classifier's head is part of each."""
    import veneer as vn

    plans = {
        "lora": vn.LoRA(8),
        "lora-ffn": vn.LoRA(8, at="ffn.*"),
        "ia3": vn.IA3(),
        "bottleneck": vn.Bottleneck(48),
        "prefix": vn.Prefix(10),
        "bitfit": vn.BitFit() if task == "classify" else vn.LoRA(4, at="linear"),
        "unipelt-ap": vn.preset("unipelt-ap"),
        "unipelt-apl": vn.preset("unipelt-apl"),
    }
    return {n: p + vn.Full(at="head") for n, p in plans.items()} if task == "classify" else plans


def tweets(args: Any) -> tuple[Any, Any]:
    """MiniLM with a fresh head, and tweets as tensors."""
    import torch
    import transformers

    from veneer.data.builtin import model_path, table

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("minilm"))
    rows = table("tweets")
    names = sorted(set(rows.labels))
    rows, _ = rows.split(args.rows, 0, 0)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_path("minilm"), num_labels=len(names), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    made = tokenizer(rows.texts, truncation=True, max_length=args.length, padding=True, return_tensors="pt", return_token_type_ids=False)
    return model, {**made, "labels": torch.tensor([names.index(x) for x in rows.labels])}


def prepared(args: Any) -> tuple[Any, Any]:
    """The same from the folder that prepare.py wrote."""
    from tasks import base_of, data_of

    data = data_of(Path(args.data), "tweets", args.length)
    return base_of(Path(args.data), data["classes"], args.device, dropout=0.0), {k: v[: args.rows] for k, v in data["pool"].items()}


def shape(args: Any) -> tuple[Any, Any]:
    """A random Llama of a known shape, and random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    d, layers, heads, kv, inner = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inner,
        vocab_size=args.vocab, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, args.vocab, (args.rows, args.length), generator=g)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random Llama instead of MiniLM")
    parser.add_argument("--dtype", default="float32", help="of the Llama's base")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--data", help="prepare.py's folder, where the demo's packages are not installed")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--graph", action="store_true", help="steps as CUDA graphs, in both arms")
    parser.add_argument("--only", nargs="*", help="of the candidates")
    args = parser.parse_args()

    import torch
    import transformers

    import veneer as vn
    from veneer.select.race import race

    torch.set_float32_matmul_precision("highest")  # the same numbers in both arms, as far as the kernels give them
    model, data = shape(args) if args.shape else prepared(args) if args.data else tweets(args)
    model = model.to(args.device).eval()
    data = {k: v.to(args.device) for k, v in data.items()}
    plans = candidates("lm" if args.shape else "classify")
    plans = {n: plans[n] for n in args.only or plans}
    device = torch.cuda.get_device_name(0) if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    about = {
        "device": device, "torch": torch.__version__, "transformers": transformers.__version__, "base": args.shape or "minilm",
        "parameters": sum(p.numel() for p in model.parameters()), "candidates": list(plans), "batch": args.batch, "length": args.length, "steps": args.steps,
        "graph": args.graph,
    }  # fmt: skip
    print(json.dumps({"what": "setting", **about}), flush=True)

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    def score(m: Any) -> float:  # the arms are about training
        return 0.0

    def run(which: dict[str, Any], steps: int) -> tuple[float, dict[str, dict[str, Any]]]:
        ends: dict[int, float] = {}
        first = min(6 if args.graph else 1, steps - 2)  # a recording is made at the fourth

        def mark(step: int, _: Any) -> None:
            if step in (first, steps - 1):
                wait()
                ends[step] = time.perf_counter()

        race(model, which, data, score, steps=steps, batch=args.batch, keep="all", best=False, seed=1, on_step=mark, graph=args.graph)
        found = {n: {k: v.detach().float().cpu().clone() for k, v in vn.Adapter(model, n).named_parameters()} for n in which}
        for n in which:
            vn.detach(model, n)
        return (ends[steps - 1] - ends[first]) / (steps - 1 - first), found  # seconds a step, the set-up of the first ones left out

    def together() -> tuple[float, dict[str, Any]]:
        return run(plans, args.steps)

    def apart() -> tuple[float, dict[str, Any]]:
        seconds, found = 0.0, {}
        for n, p in plans.items():
            s, w = run({n: p}, args.steps)
            seconds += s
            found |= w
            print(json.dumps({"what": "alone", "candidate": n, "ms_a_step": round(1000 * s, 2)}), flush=True)
        return seconds, found

    run(plans, 3)
    times: dict[str, list[float]] = {"together": [], "apart": []}
    weights: dict[str, Any] = {}
    for i in range(args.repeats):
        for name, arm in (("together", together), ("apart", apart)) if i % 2 == 0 else (("apart", apart), ("together", together)):
            seconds, weights[name] = arm()
            times[name].append(seconds)
            print(json.dumps({"what": name, "ms_a_step": round(1000 * seconds, 2), "repeat": i}), flush=True)
    worst = {n: max(float((weights["together"][n][k] - w).abs().max()) for k, w in weights["apart"][n].items()) for n in plans}
    a, b = statistics.median(times["together"]), statistics.median(times["apart"])
    print(json.dumps({"what": "result", "together_ms": round(1000 * a, 2), "apart_ms": round(1000 * b, 2), "times_faster": round(b / a, 3)}), flush=True)
    print(json.dumps({"what": "largest difference of a weight", **{n: float(f"{v:.2e}") for n, v in worst.items()}}), flush=True)
    if args.device == "cuda":
        print(json.dumps({"what": "peak", "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}), flush=True)


if __name__ == "__main__":
    main()
