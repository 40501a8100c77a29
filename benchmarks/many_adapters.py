"""Many adapters in one batch: what a batch costs whose rows all use another adapter, beside the base alone and beside PEFT.

    python benchmarks/many_adapters.py --size 1b
    python benchmarks/many_adapters.py --size tiny --device cpu --arms base,veneer,train-one,train-mixed --repeat 2   # does it run?

Every arm is a process of its own with the same random Llama, `--adapters` LoRA adapters (rank --r, all linears) and a batch of
`--batch` prompts of `--length` tokens, row i with adapter i. JSON lines go to --out ($OUT or results/ otherwise), the table
comes last. Times are medians of --repeat.

arms   base          the base alone: prefill (one call with a cache), and a token of model.generate
       base-graph    the same with a static cache, layers compiled, a decoding step as one CUDA graph
       base-static   model.generate(cache_implementation="static") as transformers compiles it
       veneer, veneer-graph, veneer-static   the same under vn.route, after comparing rows with their adapters alone
       pair          base and veneer in one process, call by call in turn: prefill, and a decoding step's own call; what each is made of
       peft          Hugging Face PEFT: adapter_names
       train-one     a training step of one adapter (vn.optimize), all rows with it
       train-mixed   a training step of all adapters under vn.route
       train-pair    both in one process, step by step in turn, and what a step of each is made of: operations and calls of Python
       adding        what attaching each further adapter costs;  adding-peft
"""

from __future__ import annotations

import argparse
import fcntl
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from arms import versions
from train_step import SIZES

DEFAULT = "base,veneer,peft,base-graph,veneer-graph,base-static,veneer-static,train-one,train-mixed,adding,adding-peft"


def build(a: argparse.Namespace) -> Any:
    import torch
    import transformers

    d, inner, n, heads, kv, width, words, *_ = SIZES[a.size]
    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=n, num_attention_heads=heads, num_key_value_heads=kv, head_dim=width,
        vocab_size=words, max_position_embeddings=max(2048, a.length + a.tokens), tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    with torch.device(a.device):
        torch.set_default_dtype(torch.float32 if a.device == "cpu" else torch.bfloat16)
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    return model.eval()


def wait(a: argparse.Namespace) -> None:
    import torch

    if a.device != "cpu":
        torch.cuda.synchronize()


def timed(a: argparse.Namespace, fn: Callable[[], Any], warmup: int = 2, repeat: int | None = None) -> list[float]:
    """Milliseconds of each call."""
    for _ in range(warmup):
        fn()
    out = []
    with turn(a):
        for _ in range(repeat or a.repeat):
            wait(a)
            t = time.perf_counter()
            fn()
            wait(a)
            out.append(1e3 * (time.perf_counter() - t))
    return out


@contextmanager
def turn(a: argparse.Namespace) -> Iterator[None]:
    """Arms that run --together are measured one at a time; only their start and their compiler run side by side."""
    if not a.lock:
        yield
        return
    with open(a.lock, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def say(a: argparse.Namespace, what: str, values: list[float], **more: Any) -> None:
    value = statistics.median(values)
    print(json.dumps({"arm": a.arm, "what": what, "median": value, "min": min(values), "max": max(values), "runs": len(values), **more}), flush=True)


def stir(model: Any) -> None:
    """B starts at zero: give adapters something to say."""
    import torch

    g = torch.Generator(device=next(model.parameters()).device).manual_seed(7)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(".B") or "lora_B" in n:
                p.normal_(0, 0.02, generator=g)


def names(a: argparse.Namespace) -> list[str]:
    return [f"a{i % a.adapters}" for i in range(a.batch)]


def attach(a: argparse.Namespace, model: Any, count: int) -> list[float]:
    """Attach `count` adapters; seconds of each."""
    import veneer as vn

    took = []
    for i in range(count):
        wait(a)
        t = time.perf_counter()
        vn.attach(model, vn.LoRA(a.r, alpha=2 * a.r, at="linear"), name=f"a{i}")
        wait(a)
        took.append(time.perf_counter() - t)
    stir(model)
    return took


def attach_peft(a: argparse.Namespace, model: Any, count: int) -> tuple[Any, list[float]]:
    import peft

    config = peft.LoraConfig(r=a.r, lora_alpha=2 * a.r, target_modules="all-linear", task_type="CAUSAL_LM")
    took: list[float] = []
    for i in range(count):
        wait(a)
        t = time.perf_counter()
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
        wait(a)
        took.append(time.perf_counter() - t)
    stir(model)
    return model.eval(), took


def infer(a: argparse.Namespace, model: Any, ids: Any, **extra: Any) -> None:
    """Prefill and decoding of `model`, as the arm's name says."""
    import torch

    mode = a.arm.partition("-")[2]
    with torch.no_grad():
        if mode == "graph":
            return say(a, "decode_ms", graphed(a, model, ids))
        if a.arm != "peft":
            say(a, "prefill_ms", timed(a, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)))
        else:
            say(a, "prefill_ms", timed(a, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra), 1, 2))
        options: dict[str, Any] = dict(do_sample=False, attention_mask=torch.ones_like(ids), **extra)
        if mode == "static":
            options["cache_implementation"] = "static"
        few, many = (3, 3 + min(a.tokens, 8)) if a.arm == "peft" else (8, 8 + a.tokens)
        # a static cache is as long as what is asked for: the same length for both, stopped earlier
        more = {"max_new_tokens": few} if mode != "static" else {"max_new_tokens": many, "stopping_criteria": [Stop(ids.shape[1] + few)]}

        def each() -> float:
            ends = []
            for own in (more, {"max_new_tokens": many}):
                wait(a)
                t = time.perf_counter()
                model.generate(input_ids=ids, **options, **own)
                wait(a)
                ends.append(time.perf_counter() - t)
            return 1e3 * (ends[1] - ends[0]) / (many - few)

        each()
        with turn(a):
            values = [each() for _ in range(1 if a.arm == "peft" else a.repeat)]
        say(a, "decode_ms", values)


class Stop:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), ids.shape[1] >= self.length, device=ids.device)


def graphed(a: argparse.Namespace, model: Any, ids: Any) -> list[float]:
    """Milliseconds of a decoding step: the model compiled, a static cache, the whole step replayed as one CUDA graph."""
    import torch
    import transformers

    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1] + a.tokens + 64)
    forward = torch.compile(model.__call__, dynamic=False) if a.device != "cpu" else model
    token = model(input_ids=ids, logits_to_keep=1, **{key: cache}).logits[:, -1:].argmax(-1)

    def step() -> None:
        token.copy_(forward(input_ids=token, **{key: cache}).logits[:, -1:].argmax(-1))

    if a.device == "cpu":
        return timed(a, step, 1)
    t = time.perf_counter()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    print(f"compiled and captured in {time.perf_counter() - t:.1f} s", file=sys.stderr)
    each = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with turn(a):
        for _ in range(2 + a.repeat):
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            wait(a)
            each.append(start.elapsed_time(end) / 4)
        if a.profile:
            show(graph.replay)
    return each[2:]


def check(a: argparse.Namespace, model: Any, ids: Any) -> None:
    """Rows of the mixed batch against each adapter alone: the relative error of the logits, and how often the first choice agrees."""
    import torch

    import veneer as vn

    with torch.no_grad():
        with vn.route(model, names(a)):
            mixed = model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()
        errors, agree, other = [], 0, []
        for i in range(0, a.batch, max(1, a.batch // 8)):
            vn.activate(model, names(a)[i])
            alone = model(input_ids=ids[i : i + 1], logits_to_keep=1).logits[0, -1].float()
            with vn.disabled(model):
                base = model(input_ids=ids[i : i + 1], logits_to_keep=1).logits[0, -1].float()
            errors.append(float((mixed[i] - alone).norm() / alone.norm()))
            other.append(float((base - alone).norm() / alone.norm()))
            agree += int(mixed[i].argmax() == alone.argmax())
    say(a, "error", errors, agree=agree / len(errors), adapters_say=statistics.median(other))


def stepper(a: argparse.Namespace, model: Any, ids: Any, many: bool) -> Callable[[], None]:
    """A training step of all adapters, row by row, or of one."""
    import veneer as vn

    attach(a, model, a.adapters if many else 1)
    model.train()
    vn.optimize(model, compile=None if a.device != "cpu" else False)
    optimizer = vn.adamw(model, lr=1e-4)
    rows = names(a) if many else ["a0"] * a.batch
    shuffled = random.Random(0)

    def step() -> None:
        if many:
            if a.shuffle:
                shuffled.shuffle(rows)
            with vn.route(model, rows):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(a: argparse.Namespace, model: Any, ids: Any) -> None:
    import torch

    step = stepper(a, model, ids, a.arm == "train-mixed")
    values = timed(a, step, 3)
    peak = torch.cuda.max_memory_allocated() / 2**30 if a.device != "cpu" else 0.0
    say(a, "step_ms", values, peak_gib=peak)
    if a.profile and a.device != "cpu":
        with turn(a):
            show(step)


def pair(a: argparse.Namespace, model: Any, ids: Any) -> None:
    steps = {"one": stepper(a, model, ids, False), "mixed": stepper(a, build(a), ids, True)}
    in_turn(a, "", steps, 3)


def pair_inference(a: argparse.Namespace, model: Any, ids: Any) -> None:
    import torch
    import transformers

    import veneer as vn

    routed = build(a)
    attach(a, routed, a.adapters)
    rows, token = names(a), ids[:, :1]

    def prefill(m: Any) -> Any:
        return m(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(m: Any, cache: Any) -> None:
        m(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    with torch.no_grad(), vn.route(routed, rows):
        models = {"base": model, "veneer": routed}
        in_turn(a, "prefill_", {who: partial(prefill, m) for who, m in models.items()})
        caches = {who: prefill(m).past_key_values for who, m in models.items()}
        assert all(isinstance(c, transformers.DynamicCache) for c in caches.values())
        in_turn(a, "decode_", {who: partial(decode, m, caches[who]) for who, m in models.items()})


def in_turn(a: argparse.Namespace, what: str, steps: dict[str, Callable[[], Any]], warmup: int = 2) -> None:
    """Milliseconds, operations and calls of two steps that take turns, and the ratio of their times: the second to the first."""
    found: dict[str, list[float]] = {who: [] for who in steps}
    for step in steps.values():
        timed(a, step, warmup, 1)
    for _ in range(a.repeat):
        for who, step in steps.items():
            found[who] += timed(a, step, 0, 1)
    for who, step in steps.items():
        say(a, f"{what}{who}_ms", found[who])
        say(a, f"{what}{who}_ops", [operations(step)])
        say(a, f"{what}{who}_calls", [calls(step)])
    say(a, f"{what}ratio", [m / o for o, m in zip(*found.values(), strict=True)])


def operations(step: Callable[[], Any]) -> float:
    """How many of torch's operations a call runs, those inside of others counted too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as p:
        step()
    return sum(e.count for e in p.key_averages())


def calls(step: Callable[[], Any]) -> float:
    """How many functions, of Python and of C, are called in the calling thread."""
    count = 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def show(step: Callable[[], Any]) -> None:
    from arms import profile

    for key, count, ms in profile(step)[:22]:
        print(f"  {ms:9.3f} ms {count:5d}  {key}", file=sys.stderr)


def worker(a: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(a.threads)
    model = build(a)
    ids = torch.randint(5, SIZES[a.size][6], (a.batch, a.length), generator=torch.Generator().manual_seed(1)).to(a.device)
    who = a.arm.partition("-")[0]
    if who == "train":
        return (pair if a.arm == "train-pair" else train)(a, model, ids)
    if who == "adding":
        took = attach_peft(a, model, a.adapters)[1] if a.arm == "adding-peft" else attach(a, model, a.adapters)
        say(a, "first_s", took[:1])
        say(a, "last_s", took[-1:], all=[round(t, 4) for t in took])
        return
    if who == "peft":
        model, _ = attach_peft(a, model, a.adapters)
        return infer(a, model, ids, adapter_names=names(a))
    if who == "pair":
        return pair_inference(a, model, ids)
    if who == "base":
        return infer(a, model, ids)
    import veneer as vn

    attach(a, model, a.adapters)
    if a.arm == "veneer":
        check(a, model, ids)
    with vn.route(model, names(a)):
        infer(a, model, ids)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="tiny", choices=SIZES)
    p.add_argument("--arms", default=DEFAULT)
    p.add_argument("--adapters", type=int, default=32)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--device", default=None)
    p.add_argument("--repeat", type=int, default=7)
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--profile", action="store_true", help="list the kernels of training steps")
    p.add_argument("--shuffle", action="store_true", help="another order of the adapters in every mixed training step")
    p.add_argument("--limit", type=int, default=600, help="the most seconds an arm may take")
    p.add_argument("--together", action="store_true", help="start all arms at once; each is still measured alone")
    p.add_argument("--lock", default="", help=argparse.SUPPRESS)
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    p.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.device is None:
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.arm:
        return worker(a)
    keep = ("size", "adapters", "batch", "length", "tokens", "r", "device", "repeat", "threads")
    argv = [v for k in keep for v in (f"--{k}", str(getattr(a, k)))] + ["--profile"] * a.profile + ["--shuffle"] * a.shuffle
    argv += ["--lock", str(Path(a.out) / "lock")] if a.together else []
    info = {"benchmark": "many_adapters", **{k: getattr(a, k) for k in (*keep, "shuffle")}, **versions(a.device)}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    got: dict[tuple[str, str], float] = {}
    with open(out / f"many_adapters_{a.size}.jsonl", "a") as f:
        t, names = time.perf_counter(), a.arms.split(",")
        started = {arm: start(arm, argv, out) for arm in names} if a.together else {}
        for arm in names:
            process = started.get(arm) or start(arm, argv, out)
            try:
                process.wait(timeout=a.limit)
            except subprocess.TimeoutExpired:
                process.kill()
            done = (out / f"{arm}.out").read_text()
            lines = [json.loads(line) for line in done.splitlines() if line.startswith("{")]
            for line in lines:
                got[arm, line["what"]] = line["median"]
                f.write(json.dumps({**info, **line}) + "\n")
                f.flush()
                print(f"{arm:<16}{line['what']:<21}" + " ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, (int, float))), flush=True)
            if not lines:
                print(f"--- {arm} failed:\n{(out / f'{arm}.log').read_text()[-1500:]}")
            print(f"    {arm} done after {time.perf_counter() - t:.0f} s", file=sys.stderr, flush=True)
    print("\n" + json.dumps(info))
    table(got)


def start(arm: str, argv: list[str], out: Path) -> subprocess.Popen[str]:
    with open(out / f"{arm}.log", "w") as log, open(out / f"{arm}.out", "w") as said:
        return subprocess.Popen([sys.executable, sys.argv[0], *argv, "--arm", arm], stdout=said, stderr=log, text=True)


def table(got: dict[tuple[str, str], float]) -> None:
    """Each figure with its ratio to the base's (one adapter's, the first's), and PEFT's to it."""
    print(f"{'arm':<16}{'what':<21}{'':>10}{'x base':>9}{'PEFT x':>9}")
    for (arm, what), value in got.items():
        who, _, mode = arm.partition("-")
        base = {"train": ("train-one", what), "adding": (arm, "first_s")}.get(who, (f"base-{mode}".rstrip("-"), what))
        if arm == "train-pair":
            base = (arm, f"one_{what.partition('_')[2]}")
        if arm == "pair":
            base = (arm, what.replace("veneer", "base"))
        peft = got.get(("adding-peft" if who == "adding" else "peft", what))
        ratio = f"{value / got[base]:.2f}" if got.get(base) and what not in ("error", "ratio", "prefill_ratio", "decode_ratio") else ""
        print(f"{arm:<16}{what:<21}{value:>10.4g}{ratio:>9}{f'{peft / value:.1f}' if peft else '':>9}")


if __name__ == "__main__":
    main()
