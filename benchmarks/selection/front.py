"""AutoPEFT's space on a real task: the front of vn.select's search, of random search and of Optuna's plain TPE, at equal cost.

    python benchmarks/selection/front.py                        # MiniLM, 500 tweets
    python benchmarks/selection/front.py --layers 2 --train 320 --test 300 --steps 60 --length 16 --cost 12 --batch 8 --rate 10   # 2 cores

Cost is counted in trainings in full (a rung of 1/3 of the steps costs 1/3), the same for each arm; scoring is not counted. The
measure is the hypervolume over (accuracy, log10 of the parameters) of what was trained in full, against the majority class and
the largest plan of the space. Every (plan, part of the training) is trained once for all arms and kept in --cache, so a run
that was stopped goes on. `ours` is Search as vn.select runs it; `plain TPE` is Optuna's TPESampler with its defaults.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import torch
import transformers

import veneer as vn
from veneer.data.builtin import model_path, table
from veneer.files import write_whole
from veneer.select import budget, choose, measure
from veneer.select.data import make
from veneer.select.fit import Job, Worker
from veneer.select.search import Search, generation_of, rungs_of
from veneer.select.space import Candidate, Space


class Cached:
    """An executor that trains what it has not seen yet, and counts what each answer would have cost."""

    def __init__(self, path: Path) -> None:
        self.path, self.cost = path, 0.0
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, worker: Worker, jobs: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, job in enumerate(jobs):
            key = json.dumps([job.plan, job.rate, job.share], sort_keys=True)
            if key not in self.known:
                self.known[key] = worker(Job(job.plan, job.rate, job.share))
                write_whole(self.path, json.dumps(self.known).encode())
            self.cost += job.share
            yield i, self.known[key]


def one(run: Cached, worker: Worker, candidate: Candidate) -> float | None:
    return next(run(worker, [Job(candidate.plan.to_dict(), candidate.rate, 1.0)]))[1]["score"]


def ours(space: Space, worker: Worker, run: Cached, cost: float, seed: int, rungs: list[float], starts: bool = True) -> list[tuple[float, float]]:
    each = sum(share * math.ceil(9 / 3**i) for i, share in enumerate(rungs))
    trials = int(9 * cost / each)
    search = Search(space, budget.Budget(trials=trials), worker, run, {}, rungs=rungs, generation=generation_of(rungs, True), seed=seed, starts=starts)
    return [(t.score, math.log10(t.objectives["parameters"])) for t in choose.full(search.run())]


def plain(space: Space, worker: Worker, run: Cached, cost: float, seed: int, sampler: Any, ceiling: float) -> list[tuple[float, float]]:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=seed))
    found: list[tuple[float, float]] = []
    while len(found) < cost:
        trial = study.ask()

        def pick(name: str, options: Any, ordered: bool, trial: Any = trial) -> int:
            return trial.suggest_int(name, 0, len(options) - 1) if ordered else trial.suggest_categorical(name, list(range(len(options))))

        candidate = space.draw(pick)
        if candidate is None:  # told as the worst of the space: of a failure TPE learns nothing, and with seed 1 it asked for the empty plan for ever
            study.tell(trial, (0.0, ceiling))
            continue
        score = one(run, worker, candidate)
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            found.append((0.0, math.inf))
            continue
        found.append((score, math.log10(measure.count(worker.model, candidate.plan))))
        study.tell(trial, found[-1])
    return found


def main() -> None:
    ask = argparse.ArgumentParser()
    for name, default in (("layers", 6), ("train", 500), ("test", 1000), ("steps", 180), ("length", 64), ("cost", 18), ("seeds", 5), ("batch", 16)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--cache", type=Path, default=Path("runs/front.json"))
    ask.add_argument("--arms", default="", help="only those, as 'ours,random'")
    ask.add_argument("--rate", type=float, default=6.0, help="times the methods' default learning rate")
    args = ask.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_path("minilm"), num_labels=3, num_hidden_layers=args.layers).to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("minilm"), model_max_length=args.length)
    train, test = table("tweets").split(args.train, args.test, 0)
    data = make((train, test), model, tokenizer=tokenizer, collate=None, metric="accuracy", examples=None, seed=0)
    worker = Worker(model, data, args.steps, args.batch)
    space = Space.parse("autopeft", model, beside=vn.Full(at="head"))
    space.rates = [args.rate]
    largest = space.draw(lambda name, options, ordered: len(options) - 1)
    labels = [x["labels"] for x in data.evaluation]
    reference = max(map(labels.count, set(labels))) / len(labels), math.log10(measure.count(model, largest.plan))
    print(f"{space.size:,} candidates, {args.steps} steps each, {args.cost} trainings an arm, reference {reference[0]:.3f}, 10^{reference[1]:.2f}; {device}")
    run = Cached(args.cache)
    arms = {
        "random": lambda seed: plain(space, worker, run, args.cost, seed, optuna.samplers.RandomSampler, reference[1]),
        "plain TPE": lambda seed: plain(space, worker, run, args.cost, seed, optuna.samplers.TPESampler, reference[1]),
        "ours": lambda seed: ours(space, worker, run, args.cost, seed, rungs_of(args.steps)),
        "ours, in full": lambda seed: ours(space, worker, run, args.cost, seed, [1.0]),
        "ours, no starts": lambda seed: ours(space, worker, run, args.cost, seed, rungs_of(args.steps), False),
        "ours, 1/3 first": lambda seed: ours(space, worker, run, args.cost, seed, [1 / 3, 1.0]),
    }
    arms = {n: a for n, a in arms.items() if not args.arms or n in args.arms.split(",")}
    volumes: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(args.seeds):
        for name, arm in arms.items():
            run.cost = 0.0
            points = arm(seed)
            volumes[name].append(choose.hypervolume(points, reference))
            best = max(points)[0]
            print(
                f"seed {seed}  {name:<17} hypervolume {volumes[name][-1]:.4f}  best {best:.3f}  trained in full {len(points):>2}  cost {run.cost:.1f}",
                flush=True,
            )
    for name, found in volumes.items():
        print(f"{name:<17} {mean(found):.4f} ± {stdev(found) if len(found) > 1 else 0:.4f}  ({len(found)} seeds)")


if __name__ == "__main__":
    main()
