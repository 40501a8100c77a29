"""What a selection found: trials, the Pareto front, the recommended plan. Plain data that a page or a file can show."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import read_json, write_whole
from ..plan import Plan

# what a trial can be judged by, and whether more of it is better
OBJECTIVES = {"score": True, "parameters": False, "latency": False, "memory": False, "seconds": False}
STATUSES = {
    "complete": "trained in full",
    "dropped": "worse than others after part of the training",
    "diverged": "its loss or its score is no finite number",
    "over budget": "known to be over the budget before any training",
    "failed": "could not be trained; `why` says so",
    "unfinished": "the time was up",
}
FILE, FORMAT = "selection.json", "veneer-selection"


@dataclass
class Trial:
    """One candidate and what is known of it.

    number      in the order in which the candidates were tried, from 0
    plan        as Plan.to_dict gives it, with what every candidate has besides (a fresh head)
    rate        the learning rate it was trained with
    status      a key of STATUSES
    objectives  score (higher is better; the metric's own unit), parameters (trainable numbers), latency (seconds of one
                batch of inference over the base's: 1.05 is 5% slower), memory (bytes at the peak of a training step),
                seconds (of training in full); a key is missing where it was not measured
    share       parameters over the base's
    noise       standard error of `score` over the evaluation examples (bootstrap)
    merges      whether all of its methods merge, so that its latency is the base's own
    curves      'loss' and 'score': lists of [step, value], by rung: {"1/9": {"loss": [[1, 0.7], …], "score": [[50, 0.81]]}}
    cost        steps, examples (rows that were trained on, counted each time), seconds: all that was spent on this candidate
    pscp        PEFT-Bench's score with soft penalties (choose.pscp), where score lies in [0, 1]
    why         a sentence, where status is not 'complete'
    """

    number: int
    plan: dict[str, Any]
    rate: float
    status: str = "complete"
    objectives: dict[str, float] = field(default_factory=dict)
    share: float = 0.0
    noise: float = 0.0
    merges: bool = False
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    pscp: float | None = None
    why: str = ""
    replicates: list[float] = field(default_factory=list, repr=False)  # bootstrap scores, the same draws for all trials

    @property
    def score(self) -> float:
        """The score; NaN where there is none."""
        return self.objectives.get("score", math.nan)

    @property
    def label(self) -> str:
        """The plan as Python, on one line."""
        return str(Plan.from_dict(self.plan))


@dataclass
class Selection:
    """The answer of `vn.select`; printing it shows the table.

    trials      every candidate, in order
    chosen      the number of the recommended trial; `reason` says why it and not another, in a sentence
    budget      the limits in the user's words, such as {"params": "0.1%"}
    limits      the same in numbers: parameters, latency, memory, minutes, trials
    objectives  those that the front is about
    cost        seconds, steps, examples, trials: of the whole search
    settings    model, metric, steps, batch_size, space, sampler, seed, …: how to repeat it
    device      in words
    config      the other keys of a training configuration, where the selection was made from one
    """

    trials: list[Trial]
    chosen: int
    reason: str
    budget: dict[str, Any]
    limits: dict[str, float]
    objectives: tuple[str, ...]
    cost: dict[str, float]
    settings: dict[str, Any]
    device: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The recommended trial."""
        return next(t for t in self.trials if t.number == self.chosen)

    @property
    def recommended(self) -> Plan:
        """The recommended plan, ready for vn.attach."""
        return Plan.from_dict(self.best.plan)

    @property
    def front(self) -> list[Trial]:
        """The Pareto front over `objectives` of what was trained in full, cheapest in parameters first."""
        return self.front_by(*self.objectives)

    def front_by(self, *objectives: str) -> list[Trial]:
        """The Pareto front over other objectives."""
        from .choose import front

        return front(self.trials, objectives)

    @property
    def pscp(self) -> dict[int, float]:
        """PEFT-Bench's score of each trial that has one, by number."""
        return {t.number: t.pscp for t in self.trials if t.pscp is not None}

    def yaml(self) -> str:
        """The recommended plan and its learning rate, as lines of a configuration for `veneer train`; a whole one where the
        selection was made from one."""
        import yaml

        return yaml.safe_dump(self.config | {"plan": self.best.plan, "learning_rate": self.best.rate}, sort_keys=False, allow_unicode=True)

    def table(self, most: int = 20) -> str:
        """The trials as text, best score first; `*` marks the front, `>` the recommended one."""
        from .table import plain

        return plain(self, most)

    __str__ = __repr__ = lambda self: self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        out = {"format": FORMAT, "version": 1} | dataclasses.asdict(self)
        return out | {"objectives": list(self.objectives), "front": [t.number for t in self.front]}

    @staticmethod
    def from_dict(data: Any, where: str = "selection") -> Selection:
        """What `to_dict` gave. Raises: StoreError for anything else."""
        try:
            if data["format"] != FORMAT:
                raise KeyError("format")
            own = {k: v for k, v in data.items() if k not in ("format", "version", "front")}
            return Selection(**own | {"trials": [Trial(**t) for t in own["trials"]], "objectives": tuple(own["objectives"])})
        except (TypeError, KeyError, AttributeError) as e:
            raise StoreError(f"not a selection of ours: {e}", where=where, fix="Give the selection.json that vn.select or `veneer select` wrote") from None

    def save(self, path: str | Path) -> Path:
        """Write `selection.json`, `plan.yaml` and the page `report.html` into the folder `path`, each whole or not at all;
        return the folder.

        Raises: StoreError where the folder cannot be written.
        """
        from ..report.selection import report

        folder = Path(path)
        write_whole(folder / FILE, (json.dumps(_plain(self.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        write_whole(folder / "plan.yaml", self.yaml().encode())
        report(folder)
        return folder

    @staticmethod
    def load(path: str | Path) -> Selection:
        """What `save` wrote in the folder (or file) `path`. Raises: StoreError."""
        found = Path(path)
        found = found / FILE if found.is_dir() else found
        return Selection.from_dict(read_json(found), str(found))


def _plain(value: Any) -> Any:
    """`value` without NaN and infinity, which JSON does not have: a key that held one is missing, an item is null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if _finite(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) if _finite(v) else None for v in value]
    return value


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
