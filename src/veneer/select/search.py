"""The search: generations of candidates from Optuna, each trained a little, then the better ones further."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, did_you_mean
from . import measure
from .asking import SAMPLERS, Asking
from .budget import Budget
from .choose import ranked
from .executor import Executor
from .fit import Job, Worker
from .journal import EXTENDABLE, Record, record
from .limits import Limits
from .report import Trial
from .space import Space

ETA = 3  # of those trained so far, one in ETA goes on (Li et al., JMLR 2018)
LEAST_STEPS = 60  # after 20 steps every plan of AutoPEFT's space was still near chance, and dropping by that was worse than none
UNBOUNDED = 100_000


def rungs_of(steps: int) -> list[float]:
    """Shares of the steps after which candidates are compared: 1/9, 1/3, 1, as far as there are steps for them."""
    return [s for s in (1 / ETA**2, 1 / ETA) if steps * s >= LEAST_STEPS] + [1.0]


def generation_of(rungs: list[float], serial: bool) -> int:
    """Candidates that are asked for before any of them is judged. Where none is dropped early and they are trained one after another,
    each question can use all answers so far."""
    return 1 if serial and len(rungs) == 1 else ETA**2


def rung_name(share: float) -> str:
    return "full" if share == 1 else f"1/{round(1 / share)}"


@dataclass
class Progress:
    """What is told while a search runs: the event ('start' or 'rung', the end of a part of the training) and the state.

    share  of the search that is done, by steps or by minutes; left: seconds that it may still take (None: unknown)
    most   candidates at most, or 0
    """

    event: str
    trial: Trial
    rung: str
    trials: list[Trial]
    elapsed: float
    share: float
    left: float | None
    most: int


@dataclass
class Search:
    """Finds good plans of `space` within `budget`.

    sampler     'tpe': multi-objective TPE (Ozaki et al. 2022) over score and the logarithm of the parameters (`worth`), with
                the space's own starts first; 'random'; 'grid': every candidate in turn
    rungs       shares of the steps; the last is 1. [1.0] trains every candidate in full
    generation  candidates that are compared with each other on each rung
    finalists   no rung leaves fewer of a generation
    """

    space: Space
    budget: Budget
    worker: Worker
    executor: Executor
    settings: dict[str, Any]
    sampler: str = "tpe"
    rungs: list[float] = field(default_factory=lambda: [1.0])
    generation: int = ETA**2
    seed: int = 0
    folder: Path | None = None
    starts: bool = True
    tell: Callable[[Progress], None] | None = None
    finalists: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"there is no sampler {self.sampler!r}", where="sampler", fix=did_you_mean(str(self.sampler), SAMPLERS))
        self.base = measure.total(self.worker.model)
        self.limits = Limits(self.worker, self.budget, self.base)
        self.begin = time.time()
        self.record: Record
        self.spent = 0.0
        self.floor = -math.inf

    # -- the loop --------------------------------------------------------------------------------------------------------
    def run(self) -> list[Trial]:
        """Every candidate that was tried. Raises: ConfigError where none fits the budget."""
        self.limits.check(self.space)
        self.record = record(self.folder, {k: v for k, v in self.settings.items() if k not in EXTENDABLE})
        self.floor = self.worker.data.floor(self.worker.model, self.worker.eval_batch_size)
        self.spent = float(self.record.study.user_attrs.get("seconds", 0.0))
        self._clear()
        asking = Asking(self.space, self.limits, self.record, self.sampler, self.starts, self.seed, ETA**2)
        generation = 0
        while True:
            self._clock()
            room = (self.budget.trials or UNBOUNDED) - sum(1 for t in self.record.accepted() if t.user_attrs["generation"] != generation)
            if room <= 0 or self._late():
                break
            batch = asking.batch(generation, min(self.generation, room))
            if not batch:
                break
            if not self._climb(batch):
                break
            generation += 1
        self._clock()
        return self.trials()

    @property
    def elapsed(self) -> float:
        """Seconds of wall clock, of earlier runs of this search too."""
        return self.spent + time.time() - self.begin

    @property
    def deadline(self) -> float:
        return math.inf if self.budget.minutes is None else time.time() + 60 * self.budget.minutes - self.elapsed

    def _late(self) -> bool:
        return time.time() >= self.deadline

    def _clock(self) -> None:
        if self.folder is not None:
            self.record.study.set_user_attr("seconds", round(self.elapsed, 3))

    def _clear(self) -> None:
        """A killed search left a question half asked: it is asked again."""
        from optuna.trial import TrialState

        for t in self.record.all():
            if t.state == TrialState.RUNNING and t.user_attrs.get("kind") != "accepted":
                self.record.study.tell(t.number, state=TrialState.FAIL)

    # -- training ----------------------------------------------------------------------------------------------------------
    def _climb(self, batch: list[Any]) -> bool:
        """Train the generation rung by rung; False where the time was up before its end."""
        alive = sorted(t.number for t in batch)
        for r, share in enumerate(self.rungs):
            self._train(alive, share)
            trials = self.record.all()
            outcomes = {n: trials[n].user_attrs.get(f"rung {rung_name(share)}") for n in alive}
            if any(o is None or o["status"] == "unfinished" for o in outcomes.values()):
                return False
            good = [n for n in alive if outcomes[n]["status"] == "complete"]
            for n in alive:
                if n not in good:
                    self._finish(n, outcomes[n]["status"], outcomes[n])
            last = r + 1 == len(self.rungs)
            keep = len(good) if last else min(len(good), self.left(len(batch), r + 1))
            chosen = self._best(good, share)[:keep]
            for n in good:
                if last or n not in chosen:
                    self._finish(n, "complete" if last else "dropped", outcomes[n])
            alive = sorted(chosen)
            if not alive:
                break
        return True

    def _train(self, numbers: list[int], share: float) -> None:
        name = f"rung {rung_name(share)}"
        trials = self.record.all()
        todo = [n for n in numbers if trials[n].user_attrs.get(name, {"status": "unfinished"})["status"] == "unfinished"]
        last = share == self.rungs[-1]
        deadline = self.deadline
        if time.time() >= deadline:
            return
        jobs = [Job(trials[n].user_attrs["plan"], trials[n].user_attrs["rate"], share, last, deadline) for n in todo]
        for n in todo[:1]:
            self._say("start", n, share)
        for i, outcome in self.executor(self.worker, jobs):
            self.record.note(todo[i], name, outcome)
            self._clock()
            self._say("rung", todo[i], share)
            if i + 1 < len(todo):
                self._say("start", todo[i + 1], share)

    def _best(self, numbers: list[int], share: float) -> list[int]:
        """`numbers`, best first by score and parameters, among all that reached this rung."""
        name = f"rung {rung_name(share)}"
        seen = [t for t in self.record.accepted() if t.user_attrs.get(name, {}).get("status") == "complete"]
        order = ranked([self.worth(t.user_attrs[name]["score"], t.user_attrs["parameters"]) for t in seen])
        return [seen[i].number for i in order if seen[i].number in numbers]

    def _finish(self, number: int, status: str, outcome: dict[str, Any]) -> None:
        from optuna.trial import TrialState

        t = self.record.all()[number]
        if t.state != TrialState.RUNNING:
            return
        self.record.note(number, "status", status)
        worst = min((u.values[0] for u in self.record.all() if u.values is not None), default=0.0)
        score = outcome["score"] if outcome.get("score") is not None else worst
        self.record.study.tell(number, self.worth(score, t.user_attrs["parameters"]))

    def worth(self, score: float, parameters: int) -> tuple[float, float]:
        """(score, log10 of the parameters) as candidates are compared. What scores no better than nothing counts as costly as the base:
        else the cheapest plan, however useless, would be on the front, and the search would go there."""
        return score, math.log10(parameters if score > self.floor else max(parameters, self.base))

    def _say(self, event: str, number: int, part: float) -> None:
        if self.tell is None:
            return
        trials = self.trials()
        place = self.record.all()[number].user_attrs["place"]
        limits = [self.elapsed / (60 * self.budget.minutes)] if self.budget.minutes else []
        if self.budget.trials:
            limits.append(sum(t.cost["steps"] for t in trials) / self.expected(self.budget.trials))
        share = min(1.0, max(limits, default=0.0))
        left = None if share < 0.01 else self.elapsed * (1 - share) / share
        self.tell(Progress(event, trials[place], rung_name(part), trials, self.elapsed, share, left, self.budget.trials or 0))

    def expected(self, trials: int) -> float:
        """Steps that a search of `trials` candidates takes if none diverges."""
        full, rest = divmod(trials, self.generation)
        return sum(self._steps(n) for n in [self.generation] * full + ([rest] if rest else []))

    def _steps(self, n: int) -> float:
        """... of one generation of n."""
        return sum(self.worker.steps_of(share) * self.left(n, r) for r, share in enumerate(self.rungs))

    def left(self, n: int, rung: int) -> int:
        """How many of a generation of n train on the rung."""
        return max(math.ceil(n / ETA**rung), min(n, self.finalists))

    # -- the answer ----------------------------------------------------------------------------------------------------------
    def trials(self) -> list[Trial]:
        """The candidates so far, in the order of asking."""
        return [self._trial(t) for t in sorted(self.record.accepted(), key=lambda t: t.user_attrs["place"])]

    def _trial(self, t: Any) -> Trial:
        a = t.user_attrs
        found = [(rung_name(s), a[f"rung {rung_name(s)}"]) for s in self.rungs if f"rung {rung_name(s)}" in a]
        out = Trial(a["place"], a["plan"], a["rate"], a.get("status", "unfinished"), {"parameters": a["parameters"]}, a["parameters"] / self.base)
        out.merges = measure.merges(self.space_plan(a["plan"]))
        out.cost = {k: sum(o.get(k, 0) for _, o in found) for k in ("steps", "examples", "seconds")}
        for rung, o in found:
            score = [] if o.get("score") is None else [[o["steps"], o["score"]]]
            out.curves[rung] = {"loss": o.get("loss", []), "score": score}
        if not found:
            out.why = "the time was up before it began"
            return out
        rung, last = found[-1]
        out.why = last["why"]
        if last.get("score") is not None:
            out.objectives["score"], out.noise, out.replicates = last["score"], last["noise"], last["replicates"]
        if out.status == "dropped":
            out.why = f"after {rung} of the training others were better"
        if "latency" in last:
            out.objectives |= {"latency": last["latency"], "memory": float(last["memory"]), "seconds": last["train_seconds"]}
        return out

    @staticmethod
    def space_plan(data: dict[str, Any]) -> Any:
        from ..plan import Plan

        return Plan.from_dict(data)
