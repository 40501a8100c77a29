"""A generation of candidates as one race: they train together on one base, in the rows of shared batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..adapter import active
from ..plan import Plan
from .fit import LEAST_ROWS, LEAST_SCORED, Job, Worker, own_random_state, quiet
from .lanes import Candidate
from .race import race

Outcome = dict[str, Any]


class _Late(Exception):
    """The time is up."""


def together(worker: Worker, jobs: Sequence[Job], graph: bool = False) -> Iterator[tuple[int, Outcome]]:
    """Race the jobs that train on the same share of the steps; the outcomes are as `Worker` gives them one by one, but for
    what a base's own dropout draws, which is drawn for the whole batch then. `seconds` is a candidate's part of the race, by rows."""
    for share in dict.fromkeys(j.share for j in jobs):
        own = [i for i, j in enumerate(jobs) if j.share == share]
        yield from zip(own, _race(worker, [jobs[i] for i in own], share, graph), strict=True)


def _race(worker: Worker, jobs: list[Job], share: float, graph: bool) -> list[Outcome]:
    from transformers import set_seed

    steps, data = worker.steps_of(share), worker.data
    rows = data.rows(min(1.0, steps * worker.batch_size / len(data.train)), "train", LEAST_ROWS)
    held = data.rows(share, "evaluation", LEAST_SCORED)
    candidates = {
        f"candidate{i}": Candidate(Plan.from_dict(j.plan), lr=j.rate, warmup=worker.warmup, weight_decay=worker.weight_decay) for i, j in enumerate(jobs)
    }
    replicates: dict[str, list[float]] = {}

    def score(model: Any) -> float:
        found, replicates[active(model)[0]] = data.score(model, held, worker.eval_batch_size)
        return found

    def watch(step: int, records: Any) -> None:
        if time.time() > min(j.deadline for j in jobs):
            raise _Late

    try:
        if time.time() > min(j.deadline for j in jobs):
            raise _Late
        with own_random_state(), quiet():
            set_seed(worker.seed)  # what the base's own dropout draws does not hang on the caller
            train = [data.train[i] for i in rows]
            report = race(
                worker.model, candidates, train, score, steps=steps, batch=worker.batch_size, best=False, keep="none", seed=worker.seed, on_step=watch,
                graph=graph,
            )  # fmt: skip
    except _Late:
        return [{"status": "unfinished", "why": "the time was up", "loss": [], "score": None, "steps": 0, "examples": 0, "seconds": 0.0} for _ in jobs]
    return [_outcome(worker, j, report.candidates[n], replicates.get(n, [])) for j, n in zip(jobs, candidates, strict=True)]


def _outcome(worker: Worker, job: Job, record: Any, replicates: list[float]) -> Outcome:
    good = record.status in ("finished", "stopped") and record.best is not None and math.isfinite(record.best)
    out: Outcome = {
        "status": "complete" if good else "diverged", "why": "" if good else record.note or "its loss or score is no finite number",
        "loss": [list(p) for p in record.losses], "score": record.best if good else None, "steps": record.step, "examples": record.examples,
        "train_seconds": record.seconds, "seconds": record.seconds,
    }  # fmt: skip
    if good:
        out |= {"replicates": [round(r, 6) for r in replicates], "noise": float(np.std(replicates, ddof=1)) if len(replicates) > 1 else 0.0}
    if good and job.measured:
        with own_random_state():
            out |= worker.measures(Plan.from_dict(job.plan))
    return out
