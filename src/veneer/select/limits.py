"""What a candidate would break of the budget, as far as it can be told without training."""

from __future__ import annotations

import math

from ..errors import ConfigError
from . import measure
from .budget import Budget
from .fit import Worker
from .space import Candidate, Space


class Limits:
    """The budget's limits on a base of `total` parameters; each candidate is counted once."""

    def __init__(self, worker: Worker, budget: Budget, total: int) -> None:
        self.worker, self.budget, self.total = worker, budget, total
        self.counts: dict[str, int] = {}
        self.memories: dict[str, int] = {}

    def count(self, candidate: Candidate) -> int:
        """Trainable numbers."""
        key = str(candidate.plan)
        if key not in self.counts:
            self.counts[key] = measure.count(self.worker.model, candidate.plan)
        return self.counts[key]

    def over(self, candidate: Candidate) -> tuple[float, str]:
        """(by how much, what) the candidate is over the budget, as a logarithm; (0, '') where it fits."""
        b = self.budget
        if b.parameters is not None and (n := self.count(candidate)) > b.parameters:
            return math.log(n / b.parameters), f"{n:,} parameters, and the budget is {b.parameters:,}"
        if b.merged_only and not measure.merges(candidate.plan):
            return 1.0, "it does not merge, and the budget is +0% latency"
        if b.memory is not None:
            key = str(candidate.plan)
            if key not in self.memories:
                self.memories[key] = self.worker.memory(candidate.plan)
            if self.memories[key] > b.memory:
                return math.log(self.memories[key] / b.memory), f"{self.memories[key] / 1e9:.3f} GB of memory, and the budget is {b.memory / 1e9:.3f}"
        if b.latency is not None and not b.merged_only and not measure.merges(candidate.plan):
            found = measure.latency(self.worker.model, candidate.plan, self.worker.data.batch("evaluation", self.worker.batch_size))[0]
            if found > b.latency:
                return math.log(found / b.latency), f"{100 * (found - 1):.1f}% more latency, and the budget is {100 * (b.latency - 1):.1f}%"
        return 0.0, ""

    def check(self, space: Space) -> None:
        """Raise ConfigError where it is plain that nothing fits, saying what the cheapest candidate needs."""
        if self.budget.parameters is None:
            return
        cheapest, needs = space.cheapest(lambda p: measure.count(self.worker.model, p))
        if needs > self.budget.parameters:
            wrote = self.budget.words.get("params", self.budget.parameters)
            raise ConfigError(
                f"no candidate fits params: {wrote} ({self.budget.parameters:,} of the base's {self.total:,})", where="budget",
                fix=f"The cheapest, {cheapest.plan}, needs {needs:,} ({100 * needs / self.total:.3g}%)",
            )  # fmt: skip
