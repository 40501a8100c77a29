"""What a search asks next: Optuna's samplers, the space's own starts, a grid's next."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .journal import Record, seed_of
from .limits import Limits
from .space import Space

TRIES = 500  # candidates that may be over the budget or known, before a search gives up finding another
MOST_LISTED = 4000  # a space of at most that many is walked through when chance finds nothing new
SAMPLERS = ("tpe", "random", "grid")


@dataclass
class Asking:
    """Asks for candidates of `space` within `limits`, and notes them in `record`.

    sampler   of SAMPLERS, as `Search` describes them
    starts    whether 'tpe' begins with the space's own starts
    draws     questions that 'tpe' answers at random before its model does
    """

    space: Space
    limits: Limits
    record: Record
    sampler: str
    starts: bool
    seed: int
    draws: int

    def batch(self, generation: int, most: int) -> list[Any]:
        """The candidates of the generation: those on record, and new ones until there are `most`."""
        batch = [t for t in self.record.accepted() if t.user_attrs["generation"] == generation]
        tries = 0
        while len(batch) < most and tries < TRIES:
            tries += 1
            number = self._one(generation, force=tries > TRIES // 10)
            if number is None:
                break
            if number >= 0:
                batch.append(self.record.all()[number])
                tries = 0
        if not self.record.accepted():
            raise ConfigError(
                f"none of {TRIES} candidates fits the budget ({', '.join(f'{k}: {v}' for k, v in self.limits.budget.words.items())})", where="budget",
                fix=self._nearest(),
            )  # fmt: skip
        return batch

    def _nearest(self) -> str:
        near = min((t for t in self.record.all() if t.user_attrs.get("kind") == "over budget"), key=lambda t: t.user_attrs["over"], default=None)
        return "Allow more" if near is None else f"The nearest, {near.user_attrs['text']}, has {near.user_attrs['why']}"

    def _one(self, generation: int, force: bool) -> int | None:
        """Ask once. The number of the Optuna trial; -1 where the candidate is known, empty or over the budget; None where the space has no more.

        Each question has a sampler of its own, whose seed is the question's number, so that a search that was killed
        asks on as it would have.
        """
        from optuna.trial import TrialState

        asked = sum(1 for t in self.record.all() if "kind" in t.user_attrs)
        known = {t.user_attrs["key"] for t in self.record.all() if "key" in t.user_attrs}
        fixed = self._fixed(asked, known, force)
        if fixed is None:
            return None
        self.record.study.sampler = self._sampler(seed_of(self.seed, asked))
        if fixed and not self.record.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.record.study.enqueue_trial(fixed)
        trial = self.record.study.ask()

        def choose(name: str, options: Any, ordered: bool) -> int:
            return trial.suggest_int(name, 0, len(options) - 1) if ordered else trial.suggest_categorical(name, list(range(len(options))))

        candidate = self.space.draw(choose)
        if candidate is None:  # told as out of bounds: of a failure the sampler learns nothing, and asks for ever where a front's cheap end is empty
            trial.set_constraint("budget", 1.0)
            trial.set_user_attr("kind", "empty")
            self.record.study.tell(trial, [0.0, math.log10(self.limits.total)])
            return -1
        if candidate.key in known:
            trial.set_user_attr("kind", "known")
            self.record.study.tell(trial, state=TrialState.FAIL)
            return -1
        over, why = self.limits.over(candidate)
        trial.set_user_attr("key", candidate.key)
        if over > 0:
            trial.set_constraint("budget", over)
            trial.set_user_attr("text", str(candidate.plan))
            trial.set_user_attr("over", over)
            trial.set_user_attr("why", why)
            trial.set_user_attr("kind", "over budget")
            self.record.study.tell(trial, [0.0, math.log10(self.limits.count(candidate))])
            return -1
        trial.set_user_attr("plan", candidate.plan.to_dict())
        trial.set_user_attr("rate", candidate.rate)
        trial.set_user_attr("parameters", self.limits.count(candidate))
        trial.set_user_attr("generation", generation)
        trial.set_user_attr("place", len(self.record.accepted()))
        trial.set_user_attr("kind", "accepted")
        return trial.number

    def _fixed(self, asked: int, known: set[str], force: bool) -> dict[str, int] | None:
        """Choices that are not the sampler's: the space's starts, a grid's next, or, after long bad luck in a small space,
        any that is left. {}: the sampler chooses; None: nothing is left."""
        starts = self.space.starts() if self.sampler == "tpe" and self.starts else []
        if asked < len(starts):
            return starts[asked]
        walk = self.sampler == "grid" or bool(self.space.plans) or (force and self.space.size <= MOST_LISTED)
        if not walk:
            return {}
        for params, candidate in self.space:
            if candidate.key not in known:
                return params or {"": 0}
        return None

    def _sampler(self, seed: int) -> Any:
        import optuna

        if self.sampler == "tpe":
            with warnings.catch_warnings():  # `group` is called experimental: it is what lets a part's options be asked only where it is on
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=self.draws)
        return optuna.samplers.RandomSampler(seed=seed)
