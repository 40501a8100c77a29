"""Does gating pick the method a task needs? UniPELT's protocol (Mao et al. 2022) on seven other tasks, by racing.

    python benchmarks/selection/prepare.py                                             (once, where packages can be had)
    python benchmarks/selection/evidence.py --device cuda --workers 3 --part 1/2       (adds lines to lines/; on another GPU: --part 2/2)
    python benchmarks/selection/evidence.py --report                                   (the table and the claims from all lines)

Protocol. K = 100, 500, 1000 training rows of each task, 3 seeds (rows, head, order), MiniLM; 1,000 other rows choose the checkpoint
among 8 evaluations, as in the paper; test rows, at most 2,000 of a task and the same for all rows of the table, are read once, after
that. Rates: for each row of the table three were raced on four tasks at K = 500 with a seed that is used for nothing else (--tune); the
best mean score on dev rows is the row's everywhere, and stands in rates.json. The fresh head has a rate of its own, the same in all rows
(plans.py). All else is alike: AdamW, batch 16, warm-up 6%, then linear to 0, clipping at 1, the base's own dropout.

Rows. Of plans.py: full, five single methods, UniPELT's two, and ours; each with a fresh head. 'settled' is ours after
vn.settle(keep=0.5, by='layer', score=log-likelihood of the dev rows, rewind=True), trained for as many steps as every other row;
'settled-apl' is UniPELT's in the same way. Only with --rows: 'calibrated' is 'settled' with the likelihood taken at its best temperature
(settling.py), and 'by-role' so, with whole roles for groups, by='role'; 'folded' and 'folded-apl' keep the trained numbers, with a
re-tune of a quarter of the steps. 'selected' is successive halving over the light plans on dev scores with two finalists. A race gives
each candidate the weights it has alone, so which one it picks and what that scores follow from the recorded scores, and its cost
(3 runs) from the rungs.

A finished cell is one write to a file of --lines, a folder that git keeps: what any file there holds is not done again, so a run that was cut
off, another GPU's part and another day's session add up. Lines of other settings (fewer steps or rows, other rates) are never mixed in.

Needs torch, transformers, safetensors and veneer's core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from plans import FOLDED, GRID, HEAD, METHODS, SETTLED, VARIANTS, plan_of
from running import lines_of, part_of, run, setting_of, todo, write
from settling import copied, folded, structure
from tasks import TASKS, base_of, data_of, measures, predict, sample, shortest_first, some

HERE = Path(__file__).parent
SIZES, SEEDS, BATCH, EVALUATIONS = (100, 500, 1000), (0, 1, 2), 16, 8
STEPS = {100: 240, 500: 320, 1000: 400}
TUNE_TASKS, TUNE_SIZE, TUNE_SEED = ("news", "rotten", "r8", "tweets"), 500, 100
AGAIN = 4  # the re-tune of what was folded is one AGAIN-th of the steps
PROTOCOL = 2
Rates = dict[str, float]


# -- jobs ---------------------------------------------------------------------------------------------------------------
def racing(args: Any, model: Any, candidates: dict[str, Any], train: Any, dev: Any, steps: int, seed: int, keep: str) -> Any:
    from veneer.select.race import race

    return race(
        model, candidates, train, dev, steps=steps, batch=BATCH, eval_batch=max(1, args.wide // len(candidates)),
        evaluate_every=max(1, steps // EVALUATIONS), seed=seed, keep=keep, graph=args.device.startswith("cuda"),
    )  # fmt: skip


def tune(args: Any, task: str, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every choice of rates of `methods` on one task; the test rows stay unread."""
    from veneer.select.lanes import Candidate

    data = data_of(args.data, task)
    model = base_of(args.data, data["classes"], args.device, TUNE_SEED)
    lanes = {f"{m}_{i}": (m, lr) for m in methods for i, lr in enumerate(GRID[m])}
    begin = time.perf_counter()
    report = racing(
        args, model, {n: Candidate(plan_of(*x), lr=x[1]) for n, x in lanes.items()}, sample(data["pool"], TUNE_SIZE, TUNE_SEED),
        shortest_first(some(data["dev"], args.dev)), steps_of(args, TUNE_SIZE), TUNE_SEED, "none",
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    found = report.candidates
    return [
        {"kind": "rate", "task": task, "method": m, "lr": lr, "dev": found[n].best or 0.0, "status": found[n].status, "seconds": seconds}
        for n, (m, lr) in lanes.items()
    ]


def cell(args: Any, task: str, k: int, seed: int, rates: Rates) -> list[dict[str, Any]]:
    """All rows of one task, K and seed but 'selected', which follows from them."""
    import veneer as vn
    from veneer.select.lanes import Candidate

    begin = time.perf_counter()
    data = data_of(args.data, task)
    rows = {part: {key: v.to(args.device) for key, v in shortest_first(some(data[part], n)).items()} for part, n in (("dev", args.dev), ("test", args.test))}
    dev, test = rows["dev"], rows["test"]
    train = sample(data["pool"], k, seed)
    model = base_of(args.data, data["classes"], args.device, seed)
    steps = steps_of(args, k)
    out: list[dict[str, Any]] = []

    def raced(candidates: dict[str, Any], more: dict[str, dict[str, Any]]) -> None:
        """Train `candidates` together and test them in one pass."""
        report = racing(args, model, candidates, train, dev, steps, seed, "all")
        for name, guess in zip(candidates, predict(model, list(candidates), test, args.wide), strict=True):
            r = report.candidates[name]
            out.append({
                "row": name, **measures(guess, test["labels"], data["classes"]), "dev": r.best, "best_step": r.best_step, "scores": r.scores,
                "status": r.status, "parameters": r.parameters, "lr": r.settings["lr"], "seconds": round(report.seconds, 2), **more.get(name, {}),
            })  # fmt: skip

    methods = [m for m in METHODS if m in args.rows]
    raced({m: Candidate(plan_of(m, rates[m]), lr=rates[m]) for m in methods}, {})
    ways = {row: (m, args.guide, args.by) for row, m in SETTLED.items()} | VARIANTS
    own = {row: ways[row][0] for row in ways if row in args.rows}
    for m in methods:
        if m not in {**own, **{r: SETTLED[x] for r, x in FOLDED.items() if r in args.rows}}.values():
            vn.detach(model, m)
    here = {key: v.to(args.device) for key, v in train.items()}
    for row in (r for r in FOLDED if r in args.rows):
        m = SETTLED[FOLDED[row]]
        vn.attach(model, vn.use(m, train=True), name=row)
        out.append({"row": row, "lr": rates[m], **folded(args, model, row, here, dev, test, max(1, steps // AGAIN), seed, rates[m], data["classes"])})
    for row in (r for r in VARIANTS if r in own):
        copied(model, own[row], row)
    found = {row: structure(args, model, row if row in VARIANTS else m, here, dev, seed, *ways[row][1:]) for row, m in own.items()}
    if "_veneer_state" in model.__dict__:
        vn.detach(model)
    if found:
        raced({r: Candidate(f.pop("plan"), lr=rates[own[r]]) for r, f in found.items()}, found)
    about = {"kind": "cell", "setting": args.setting, "task": task, "K": k, "seed": seed, "steps": steps, "cell_seconds": round(time.perf_counter() - begin, 1)}
    return [{**about, **r} for r in out]


def steps_of(args: Any, k: int) -> int:
    return args.steps or STEPS[k]


# -- running ------------------------------------------------------------------------------------------------------------
def chosen_rates(lines: list[dict[str, Any]]) -> Rates:
    """For each method the rates with the best mean dev score over the tasks that were tuned on."""
    seen: dict[str, dict[float, list[float]]] = {}
    for x in lines:
        if x["kind"] == "rate":
            seen.setdefault(x["method"], {}).setdefault(x["lr"], []).append(x["dev"])
    return {m: max(by, key=lambda lr: statistics.mean(by[lr])) for m, by in seen.items()}


def tuned(args: Any, methods: list[str]) -> None:
    """Race the grids of rates, and write what is best to --rates. Its lines are not of the table."""
    args.out = args.lines / "tuning.jsonl"
    done = {(x["task"], x["method"]) for x in lines_of(args.out) if x["kind"] == "rate"}
    groups = [methods[i : i + 3] for i in range(0, len(methods), 3)]
    run(tune, args, [(t, g) for g in groups for t in args.tune_tasks if any((t, m) not in done for m in g)])
    found = chosen_rates(lines_of(args.out))
    missing = [m for m in methods if m not in found]
    if missing:
        raise SystemExit(f"no rates for {', '.join(missing)}: the time was up, or see the errors in {args.out}; the same command goes on")
    args.rates.write_text(json.dumps({m: found[m] for m in METHODS if m in found}, indent=1) + "\n")
    print(f"rates in {args.rates}: {json.dumps(found)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=HERE / ".data")
    parser.add_argument("--rates", type=Path, default=HERE / "rates.json", help="a rate for each row of plans.py; --tune writes it")
    parser.add_argument("--lines", type=Path, default=HERE / "lines", help="folder whose *.jsonl say what is done")
    parser.add_argument("--out", type=Path, help="file to add lines to; default: one in --lines, named after the device and the part")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="i/n: this process's share of the cells, for one GPU of n")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no new cell is begun")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--rows", nargs="*", default=[*METHODS, *SETTLED], help="of the table; a settled or folded one needs its own plan's")
    parser.add_argument("--steps", type=int, help="fewer steps, to try the script")
    parser.add_argument("--dev", type=int, help="fewer dev rows")
    parser.add_argument("--test", type=int, default=2000, help="most test rows of a task")
    parser.add_argument("--wide", type=int, default=1000, help="rows of an evaluation's forward, all candidates together")
    parser.add_argument("--by", default="layer", help="settle by role or by layer")
    parser.add_argument("--guide", default="likelihood", help="what settling asks: the dev rows' likelihood, or the outputs")
    parser.add_argument("--again-rate", type=float, default=0.5, help="of the re-tune of what was folded, as a multiple of the row's own")
    parser.add_argument("--tune", action="store_true", help="choose the rates, and stop")
    parser.add_argument("--tune-tasks", nargs="*", default=list(TUNE_TASKS))
    parser.add_argument("--report", action="store_true", help="only the table, from the lines of --lines")
    args = parser.parse_args()
    args.lines.mkdir(parents=True, exist_ok=True)
    args.began = time.time()
    args.until = args.began + args.budget
    methods = [m for m in METHODS if m in args.rows]
    if args.tune:
        tuned(args, methods)
        return
    rates = json.loads(args.rates.read_text())
    steps = {str(k): args.steps or n for k, n in STEPS.items()}
    setting = setting_of(
        protocol=PROTOCOL, steps=steps, batch=BATCH, dev=args.dev, test=args.test, rates=rates, head=HEAD, by=args.by, guide=args.guide, again=args.again_rate
    )  # fmt: skip
    args.setting = setting["setting"]
    if not args.report:
        args.out = args.out or args.lines / f"{args.device.partition(':')[0]}-{args.part[0]}of{args.part[1]}.jsonl"
        # seeds outermost, so that what a cut-off run has is whole seeds
        cells = [(t, k, s) for s in args.seeds for k in sorted(args.sizes, reverse=True) for t in args.tasks]
        jobs = todo(cells, args.rows, lines_of(args.lines, args.out), args.setting, args.part)
        print(f"setting {args.setting}, part {args.part[0]} of {args.part[1]}: {len(jobs)} cells to do, {len(cells)} in the grid", flush=True)
        if jobs and setting not in lines_of(args.out):
            write(args.out, [setting])
        run(cell, args, [(*c, rates) for c in jobs])
    from report import report

    print(report(lines_of(args.lines, *([args.out] if args.out else [])), args.setting))


if __name__ == "__main__":
    main()
