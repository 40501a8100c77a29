"""What a search would do, before it does it: the space, what fits, what it costs."""

from __future__ import annotations

import random
import time

from . import measure
from .fit import Job
from .search import Search, rung_name

DRAWN, TIMED = 200, 3  # candidates that are drawn; steps that are timed


def outlook(search: Search) -> str:
    """As lines of text. Trains a few steps of the cheapest candidate, for the time that a step takes. Raises: ConfigError where nothing
    fits the budget."""
    search.limits.check(search.space)
    space, worker, limits = search.space, search.worker, search.budget.limits()
    lines = [f"space {space.name}: {space.size:,} candidates" + (f", layers {space.layers}, gates {space.gates}" if space.parts else "")]
    lines += [f"  {p.name}: { ({**p.fixed, **p.choices} or 'as it is') }{', or left out' if p.can_be_off else ''}" for p in space.parts]
    lines += [f"  {p}" for p in space.plans]
    lines += [f"  left out, since the model has no place for it: {name} ({why})" for name, why in space.left_out.items()]
    lines.append(f"base: {search.base:,} parameters; budget: {', '.join(f'{k} {v:,.6g}' for k, v in limits.items()) or 'none'}")
    rng = random.Random(search.seed)
    cheapest, least = space.cheapest(lambda p: measure.count(worker.model, p))
    lines.append(f"cheapest: {cheapest.plan}, {least:,} parameters ({100 * least / search.base:.4f}%)")
    drawn = [c for _ in range(DRAWN) if (c := space.draw(lambda name, options, ordered: rng.randrange(len(options)))) is not None]
    fits = [c for c in drawn if search.budget.parameters is None or search.limits.count(c) <= search.budget.parameters]
    lines.append(f"of {len(drawn)} candidates drawn at random {len(fits)} fit the budget of parameters")
    for start in space.starts():
        c = space.draw(lambda name, options, ordered, s=start: s[name])
        if c is not None:
            n = search.limits.count(c)
            over = limits.get("parameters") is not None and n > limits["parameters"]
            lines.append(f"  {'over the budget' if over else 'tried first':<16}{n:>11,}  {c.plan}")
    steps = search.expected(search.budget.trials) if search.budget.trials else None
    rungs = ", ".join(f"{rung_name(s)} ({worker.steps_of(s)} steps)" for s in search.rungs)
    lines.append(
        f"each candidate: {rungs} of {worker.batch_size} rows, {len(worker.data.train):,} training and {len(worker.data.evaluation):,} evaluation examples"
    )
    worker(Job(cheapest.plan.to_dict(), cheapest.rate, 1 / worker.steps))  # what only the first step costs
    begin = time.perf_counter()
    done = worker(Job(cheapest.plan.to_dict(), cheapest.rate, min(1.0, TIMED / worker.steps)))
    each = done["train_seconds"] / max(1, done["steps"])
    full = each * worker.steps + max(0.0, time.perf_counter() - begin - done["train_seconds"])
    whole = f"{search.budget.trials} candidates, {steps:,.0f} steps, about {steps * each / 60:.1f} min and scoring" if steps else "until the minutes are over"
    lines.append(f"cost: one candidate in full takes about {full:.0f} s here ({each:.2f} s a step); the search: {whole}")
    return "\n".join(lines)
