"""Does gating pick the method a task needs? UniPELT's protocol (Mao et al. 2022) on seven other tasks, by racing.

    python benchmarks/selection/prepare.py                                    (once, where packages can be had)
    python benchmarks/selection/evidence.py --device cuda --workers 10        (adds lines to .out/evidence.jsonl; --resume goes on)
    python benchmarks/selection/evidence.py --report                          (the table and the claims from those lines)

Protocol. K = 100, 500, 1000 training rows of each task, 3 seeds (rows, head, order), MiniLM; 1,000 other rows choose the checkpoint
among 8 evaluations, as in the paper; test rows are read once, after that. Learning rates: for each method 4 rates are raced on three
tasks at K = 500 with a seed that is used for nothing else; the best mean score on dev rows is the method's rate everywhere. All else is
alike: AdamW, batch 16, warm-up 6%, then linear to 0, clipping at 1, the base's own dropout.

Rows. full, bitfit, bottleneck (48), prefix (10), lora (8, q and v), ia3, unipelt-ap, unipelt-apl: each with a fresh head. 'settled' is
unipelt-apl after vn.settle(keep=0.5, score=dev accuracy) and a re-tune of an eighth of its steps. 'selected' is successive halving over
the seven light plans on dev scores at 1/8, 1/4, 1/2 of the steps; a race gives each candidate the weights it has alone, so which one it
picks and what that scores follow from the recorded scores, and its cost (2.4 runs) from the rungs.

Needs torch, transformers, safetensors and veneer's core. Each finished cell is one write, so a run that is cut off loses one cell a worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = ("rotten", "plot", "r8", "news", "tweets", "amazon", "spam")
SIZES, SEEDS, BATCH = (100, 500, 1000), (0, 1, 2), 16
STEPS = {100: 240, 500: 320, 1000: 400}
TUNE_TASKS, TUNE_SIZE, TUNE_SEED = ("rotten", "r8", "tweets"), 500, 100
RATES = {
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "bitfit": (5e-4, 1e-3, 3e-3, 1e-2),
    "bottleneck": (5e-4, 1e-3, 2e-3, 5e-3),
    "prefix": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (5e-4, 1e-3, 2e-3, 5e-3),
    "ia3": (1e-3, 3e-3, 1e-2, 3e-2),
    "unipelt-ap": (5e-4, 1e-3, 2e-3, 5e-3),
    "unipelt-apl": (5e-4, 1e-3, 2e-3, 5e-3),
}
METHODS = tuple(RATES)
SINGLE = ("bitfit", "bottleneck", "prefix", "lora", "ia3")
LIGHT = METHODS[1:]
ROWS = (*METHODS, "settled", "selected")


# -- data and base ------------------------------------------------------------------------------------------------------
def data_of(folder: Path, task: str, longest: int | None = None) -> dict[str, Any]:
    """pool, dev and test of a task as dicts of tensors, and the number of classes."""
    import torch
    from safetensors.torch import load_file

    found = load_file(folder / f"{task}.safetensors")
    out: dict[str, Any] = {"classes": len(json.loads((folder / "tasks.json").read_text())[task]["labels"])}
    for part in ("pool", "dev", "test"):
        ids, length = found[f"{part}.ids"].to(torch.int64)[:, :longest], found[f"{part}.length"].long()
        mask = (torch.arange(ids.shape[1])[None] < length[:, None]).long()
        out[part] = {"input_ids": ids, "attention_mask": mask, "labels": found[f"{part}.labels"].long()}
    return out


def base_of(folder: Path, classes: int, device: str, seed: int = 0, dropout: float | None = None) -> Any:
    """MiniLM in fp32 (its weights rounded to bf16) with a fresh head."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    described = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in ("id2label", "label2id", "architectures")}
    config = BertConfig.from_dict(described | {"num_labels": classes, "dtype": "float32"})
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config).float()
    missing = model.bert.load_state_dict({k: v.float() for k, v in load_file(folder / "base.safetensors").items()}, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys), missing
    return model.to(device).eval()


def sample(pool: dict[str, Any], k: int, seed: int) -> dict[str, Any]:
    """k rows at random, with at least one of each class."""
    import torch

    order = torch.randperm(len(pool["labels"]), generator=torch.Generator().manual_seed(seed))
    labels = pool["labels"][order]
    first = [int((labels == c).nonzero()[0]) for c in labels.unique()]
    rest = [i for i in range(len(labels)) if i not in set(first)]
    rows = order[(first + rest)[:k]]
    return {key: v[rows] for key, v in pool.items()}


def plan_of(method: str) -> Any:
    import veneer as vn

    return vn.Full(at="all") if method == "full" else vn.preset(method) + vn.Full(at="head")


def predict(model: Any, names: list[str], rows: dict[str, Any], batch: int = 256) -> list[Any]:
    """The classes that each adapter gives to rows, all adapters in one batch."""
    import torch

    import veneer as vn

    model.eval()
    found: list[list[Any]] = [[] for _ in names]
    with torch.no_grad():
        for i in range(0, len(rows["labels"]), batch):
            ids, mask = rows["input_ids"][i : i + batch], rows["attention_mask"][i : i + batch]
            n, k = len(ids), len(names)
            with vn.route(model, [name for name in names for _ in range(n)]):
                logits = model(input_ids=ids.repeat(k, 1), attention_mask=mask.repeat(k, 1)).logits
            for mine, out in zip(found, logits.argmax(-1).split(n), strict=True):
                mine.append(out)
    return [torch.cat(f) for f in found]


def measures(guess: Any, truth: Any, classes: int) -> dict[str, float]:
    f1 = []
    for c in range(classes):
        hit = int(((guess == c) & (truth == c)).sum())
        both = int((guess == c).sum()) + int((truth == c).sum())
        if both:
            f1.append(2 * hit / both)
    return {"accuracy": float((guess == truth).float().mean()), "f1": sum(f1) / len(f1)}


# -- jobs ---------------------------------------------------------------------------------------------------------------
def tune(args: Any, task: str, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every rate of `methods` on one task; the test rows stay unread."""
    from veneer.select.lanes import Candidate
    from veneer.select.race import race

    data = data_of(args.data, task)
    model = base_of(args.data, data["classes"], args.device, TUNE_SEED)
    lanes = {f"{m}_{i}": (m, lr) for m in methods for i, lr in enumerate(RATES[m])}
    steps = steps_of(args, TUNE_SIZE)
    begin = time.perf_counter()
    report = race(
        model, {n: Candidate(plan_of(m), lr=lr) for n, (m, lr) in lanes.items()}, sample(data["pool"], TUNE_SIZE, TUNE_SEED), some(data["dev"], args.dev),
        steps=steps, batch=BATCH, eval_batch=args.eval_batch, evaluate_every=max(1, steps // 8), seed=TUNE_SEED, keep="none",
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    found = report.candidates
    return [
        {"kind": "rate", "task": task, "method": m, "lr": lr, "dev": found[n].best or 0.0, "status": found[n].status, "seconds": seconds}
        for n, (m, lr) in lanes.items()
    ]


def cell(args: Any, task: str, k: int, seed: int, rates: dict[str, float]) -> list[dict[str, Any]]:
    """All rows of one task, K and seed but 'selected', which follows from them."""
    import torch

    import veneer as vn
    from veneer.select.lanes import Candidate
    from veneer.select.race import race

    data = data_of(args.data, task)
    rows = {part: {key: v.to(args.device) for key, v in data[part].items()} for part in ("dev", "test")}
    dev, test = some(rows["dev"], args.dev), some(rows["test"], args.test)
    train = sample(data["pool"], k, seed)
    model = base_of(args.data, data["classes"], args.device, seed)
    steps = steps_of(args, k)
    begin = time.perf_counter()
    report = race(
        model, {m: Candidate(plan_of(m), lr=rates[m]) for m in METHODS}, train, dev,
        steps=steps, batch=BATCH, eval_batch=args.eval_batch, evaluate_every=max(1, steps // 8), seed=seed, keep="all",
    )  # fmt: skip
    raced = time.perf_counter() - begin
    out = []
    for m, guess in zip(METHODS, predict(model, list(METHODS), test, args.eval_batch), strict=True):
        r = report.candidates[m]
        out.append({
            "row": m, **measures(guess, test["labels"], data["classes"]), "dev": r.best, "best_step": r.best_step, "scores": r.scores, "status": r.status,
            "parameters": r.parameters, "lr": rates[m], "seconds": r.seconds,
        })  # fmt: skip
    name = "unipelt-apl"
    vn.activate(model, name)
    for m in METHODS:
        if m != name:
            vn.detach(model, m)
    begin = time.perf_counter()

    def accuracy(m: Any, part: dict[str, Any] = dev) -> float:
        return measures(predict_active(m, part, args.eval_batch), part["labels"], data["classes"])["accuracy"]

    def again(m: Any) -> None:
        short = max(1, steps // 8)
        generator = torch.Generator().manual_seed(seed + 7)
        optimizer = vn.adamw(m, lr=rates[name], weight_decay=0.0)
        m.train()
        for step in range(short):
            at = torch.randint(0, k, (BATCH,), generator=generator)
            batch = {key: v[at].to(args.device) for key, v in train.items()}
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * rates[name] * (1 - step / short)
            m(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        m.eval()

    head = sum(p.numel() for part in vn.Adapter(model, name).parts if part.gate is None for p in part.parameters())
    shown = [{key: v[i : i + 64].to(args.device) for key, v in train.items() if key != "labels"} for i in range(0, min(k, 256), 64)]
    settled = vn.settle(model, shown, keep=0.5, name=name, score=accuracy, retune=again)
    seconds = time.perf_counter() - begin
    parts = [{key: p[key] for key in ("method", "module", "mean", "std", "loss", "kept", "parameters")} for p in settled.parts]
    out.append({
        "row": "settled", **measures(predict_active(model, test, args.eval_batch), test["labels"], data["classes"]), "dev": accuracy(model), "parts": parts,
        "parameters": settled.after, "before": settled.before, "head": head, "lr": rates[name], "seconds": seconds,
    })  # fmt: skip
    return [{"kind": "cell", "task": task, "K": k, "seed": seed, "steps": steps, "race_seconds": raced, **r} for r in out]


def predict_active(model: Any, rows: dict[str, Any], batch: int) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        parts = [
            model(input_ids=rows["input_ids"][i : i + batch], attention_mask=rows["attention_mask"][i : i + batch]).logits.argmax(-1)
            for i in range(0, len(rows["labels"]), batch)
        ]
    return torch.cat(parts)


def some(rows: dict[str, Any], n: int | None) -> dict[str, Any]:
    return rows if n is None else {k: v[:n] for k, v in rows.items()}


def steps_of(args: Any, k: int) -> int:
    return args.steps or STEPS[k]


# -- running ------------------------------------------------------------------------------------------------------------
def lines_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:  # the last line of a run that was cut off
            continue
    return out


def work(args: Any, jobs: Any, number: int) -> None:
    """Take jobs until there are none, or until the time is up; write each one's lines as it is finished."""
    import torch

    torch.set_num_threads(max(1, args.threads))
    torch.set_float32_matmul_precision("high")
    while time.time() < args.until:
        try:
            kind, *job = jobs.get(timeout=1)
        except Exception:  # empty
            return
        begin = time.perf_counter()
        try:
            found = (tune if kind == "tune" else cell)(args, *job)
        except Exception as e:
            found = [{"kind": "error", "job": [kind, *map(str, job)], "error": f"{type(e).__name__}: {e}"}]
        text = "".join(json.dumps(line) + "\n" for line in found)
        with args.out.open("a") as f:
            f.write(text)
        note = f" {found[0]['error']}" if found[0]["kind"] == "error" else ""
        print(f"[{time.time() - args.began:6.0f} s] worker {number}: {kind} {job[:3]} in {time.perf_counter() - begin:.1f} s{note}", flush=True)


def run(args: Any, jobs: list[Any]) -> None:
    if not jobs:
        return
    if args.workers == 1:
        import queue

        mine: Any = queue.Queue()
        for job in jobs:
            mine.put(job)
        work(args, mine, 0)
        return
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    shared = context.Queue()
    for job in jobs:
        shared.put(job)
    workers = [context.Process(target=work, args=(args, shared, i)) for i in range(min(args.workers, len(jobs)))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()


def chosen_rates(lines: list[dict[str, Any]]) -> dict[str, float]:
    """For each method the rate with the best mean dev score over the tasks that were tuned on."""
    seen: dict[str, dict[float, list[float]]] = {}
    for x in lines:
        if x["kind"] == "rate":
            seen.setdefault(x["method"], {}).setdefault(x["lr"], []).append(x["dev"])
    return {m: max(by, key=lambda lr: statistics.mean(by[lr])) for m, by in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=HERE / ".data")
    parser.add_argument("--out", type=Path, default=HERE / ".out" / "evidence.jsonl")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no new job is begun")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--tune-tasks", nargs="*", default=list(TUNE_TASKS))
    parser.add_argument("--steps", type=int, help="fewer steps, to try the script")
    parser.add_argument("--dev", type=int, help="fewer dev rows")
    parser.add_argument("--test", type=int, help="fewer test rows")
    parser.add_argument("--eval-batch", type=int, default=128)
    parser.add_argument("--resume", action="store_true", help="go on with the lines that --out holds")
    parser.add_argument("--report", action="store_true", help="only the table, from the lines that --out holds")
    args = parser.parse_args()
    if args.report:
        from report import report

        print(report(lines_of(args.out)))
        return
    if args.out.exists() and not args.resume:
        raise SystemExit(f"{args.out} exists: --resume goes on with it; else name another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.began = time.time()
    args.until = args.began + args.budget
    done = {(x["task"], x["method"]) for x in lines_of(args.out) if x["kind"] == "rate"}
    pairs = [METHODS[i : i + 2] for i in range(0, len(METHODS), 2)]
    run(args, [("tune", t, p) for p in pairs for t in args.tune_tasks if any((t, m) not in done for m in p)])
    rates = chosen_rates(lines_of(args.out))
    missing = [m for m in METHODS if m not in rates]
    if missing:
        raise SystemExit(f"no rates for {', '.join(missing)}: the time was up, or see the errors in {args.out}; --resume goes on")
    print("rates", json.dumps(rates), flush=True)
    finished = {(x["task"], x["K"], x["seed"]) for x in lines_of(args.out) if x["kind"] == "cell" and x["row"] == "settled"}
    # seeds outermost, so that what a cut-off run has is whole seeds
    jobs = [("cell", t, k, s, rates) for s in args.seeds for k in sorted(args.sizes, reverse=True) for t in args.tasks if (t, k, s) not in finished]
    run(args, jobs)
    from report import report

    text = report(lines_of(args.out))
    args.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
