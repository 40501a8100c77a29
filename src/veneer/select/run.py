"""`vn.select`: a model, data, a budget and a space in; a Pareto front and a recommended plan out."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calls import device_of
from ..errors import AdapterError, ConfigError, did_you_mean
from ..methods import holder
from ..plan import Plan, finite, short, whole
from . import budget as budgets
from . import choose, measure
from .data import Data, make
from .executor import find
from .fit import Worker
from .report import OBJECTIVES, Selection, Trial
from .search import ETA, Search, generation_of, rungs_of
from .space import Space

TRIALS = 3 * ETA**2  # where neither trials nor minutes are given


def select(
    model: nn.Module,
    data: Any,
    *,
    budget: dict[str, Any] | None = None,
    space: Any = "default",
    beside: Plan | str | dict[str, Any] | None = "auto",
    objectives: Sequence[str] = tuple(OBJECTIVES),
    metric: str | Callable[[Any, Any], float] | None = None,
    tokenizer: Any = None,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    examples: int | None = None,
    epochs: float = 3.0,
    steps: int | None = None,
    batch_size: int = 16,
    eval_batch_size: int = 64,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    sampler: str = "tpe",
    halving: bool = True,
    finalists: int = 1,
    executor: str | Callable[..., Any] = "local",
    graph: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    tell: Callable[[Any], None] | None = None,
) -> Selection:
    """Find the plan that the task needs, within a budget: a Pareto front and one recommended plan.

    Candidates come from `space` in generations of nine (one after another where none is dropped early), by Optuna's
    multi-objective TPE over score and the logarithm of the parameters (Ozaki et al., JAIR 2022); what scores no better than
    the commonest class, or than the model as it is, is worth no parameters. Each is trained on a ninth of the steps (and of
    the examples), the better third on a third, the best of those in full (successive halving; Li et al., JMLR 2018), and
    only the last are on the front.
    Parameters are counted without training, so a candidate over the budget is never trained. What is measured, and how:
    measure.py.

        front        those that no other is at least as good as in all `objectives` and better in one
        recommended  the best score; among those that tie with it within one standard error over the evaluation
                     examples, the one with the fewest parameters (choose.recommend)

    model      any model that vn.attach takes, with nothing attached, whose output has `loss` (and `logits`); afterwards it is
               bit for bit what it was
    data       (training, evaluation), {'train': …, 'eval': …}, or one set of which a fifth is held out; a set is a
               sequence of tokenised examples with 'labels' (a datasets.Dataset too), or a Table of texts with `tokenizer`
    budget     {'params': '0.1%' | '50k', 'latency': '+0%' | '+10%', 'memory': '12GB', 'minutes': 30, 'trials': 40}; any of
               them. '+0%' takes only what merges. Default: 27 trials
    space      'default' (the five families), 'autopeft', 'singles', a list of plans, or a dict (space.Space)
    beside     a plan that every candidate has besides: 'auto' is vn.Full(at='head') where the labels are classes, and
               None nothing. It counts as parameters
    objectives of the front: 'score', 'parameters', 'latency', 'memory', 'seconds' (of training)
    metric     'accuracy' (default for classes), 'macro_f1', 'loss' (default otherwise; minus the mean), or a function
               (logits, labels) -> score, higher is better
    tokenizer, collate  pad and stack examples; default: the examples stack as they are
    examples   train on that many, drawn with the seed (K of a few-shot protocol); default all
    epochs, steps, batch_size, warmup, weight_decay  of training in full, with AdamW and a linear schedule, as `veneer train`
    sampler    'tpe', 'random', 'grid'; halving=False trains every candidate in full
    finalists  of each generation so many are trained in full at least: more cost more, and the last choice is between whole
               runs
    executor   'local'; 'race': a generation together on one base; 'ray': Ray Tune, over many machines (the extra `ray`)
    graph      of a race on a GPU: record a training step as a CUDA graph (race.race); examples are padded to the longest then
    folder     keep the search there: the same call goes on after a crash or kill, with the same answer, or, with a
               larger budget, further
    tell       called with a search.Progress as candidates begin and end

    Returns a Selection: `.recommended` (a Plan), `.front`, `.trials`, `.table()`, `.save(path)`.
    Raises: ConfigError (an empty space; a budget nothing meets, saying what the cheapest needs; another search in the
    folder), DataError (one class, fewer examples than `examples`), AdapterError (something is attached), PlanError, SiteError.
    """
    search = plan_search(
        model, data, budget=budget, space=space, beside=beside, objectives=objectives, metric=metric, tokenizer=tokenizer, collate=collate,
        examples=examples, epochs=epochs, steps=steps, batch_size=batch_size, eval_batch_size=eval_batch_size, warmup=warmup,
        weight_decay=weight_decay, sampler=sampler, halving=halving, finalists=finalists, executor=executor, graph=graph, seed=seed, folder=folder, tell=tell,
    )  # fmt: skip
    out = answer(search)
    if folder is not None:
        out.save(folder)
    return out


def plan_search(
    model: nn.Module, data: Any, *, budget: Any = None, space: Any = "default", beside: Any = "auto", objectives: Any = tuple(OBJECTIVES), metric: Any = None,
    tokenizer: Any = None, collate: Any = None, examples: int | None = None, epochs: float = 3.0, steps: int | None = None, batch_size: int = 16,
    eval_batch_size: int = 64, warmup: float = 0.1, weight_decay: float = 0.0, sampler: str = "tpe", halving: bool = True, finalists: int = 1,
    executor: Any = "local", graph: bool = False, seed: int = 0, folder: Any = None, tell: Any = None,
) -> Search:  # fmt: skip
    """The search that `select` runs with these arguments, all of them checked; nothing is trained or written yet."""
    check_model(model)
    objectives = check_objectives(objectives)
    _check_numbers(epochs=epochs, batch_size=batch_size, eval_batch_size=eval_batch_size)
    known = make(data, model, tokenizer=tokenizer, collate=collate, metric=metric, examples=examples, seed=seed)
    limits = budgets.parse(budget, measure.total(model))
    if limits.trials is None and limits.minutes is None:
        limits = _with(limits, trials=TRIALS)
    found = Space.parse(space, model, beside=beside_of(beside, known))
    if limits.merged_only:
        found = found.merging()
    worker = Worker(model, known, steps_of(known, steps, epochs, batch_size), batch_size, eval_batch_size, warmup, weight_decay, seed)
    if not whole(finalists) or finalists > ETA**2:
        raise ConfigError(f"finalists is {short(finalists)}", where="finalists", fix=f"Give a whole number from 1 to {ETA**2}, the size of a generation")
    settings = describe(worker, found, limits, sampler, halving, objectives) | ({"finalists": finalists} if finalists > 1 else {})
    rungs = rungs_of(worker.steps) if halving else [1.0]
    return Search(
        found, limits, worker, find(executor, graph), settings, sampler, rungs, generation_of(rungs, executor == "local"), seed,
        Path(folder) if folder is not None else None, True, tell, finalists,
    )  # fmt: skip


def answer(search: Search) -> Selection:
    """Run the search, or what is left of it, and choose."""
    trials = search.run()
    score_all(trials, search)
    try:
        best, why = choose.recommend(trials)
    except ValueError:
        first = next((t.why for t in trials if t.why), "no candidate was trained")
        raise ConfigError(
            f"none of {len(trials)} candidates could be trained; the first: {first}", fix="Give more time, a lower rate, or another space"
        ) from None
    if best.status != "complete":
        why += f"; none was trained in full, and this one is {best.status}"
    cost = {k: sum(t.cost.get(k, 0.0) for t in trials) for k in ("steps", "examples")} | {"seconds": search.elapsed, "trials": float(len(trials))}
    limits = search.budget.limits()
    return Selection(
        trials, best.number, why, search.budget.words, limits, tuple(search.settings["objectives"]), cost, search.settings, device_words(search.worker.model)
    )


def score_all(trials: list[Trial], search: Search) -> None:
    """Give each trial that was measured its PSCP: the scales are the base's own numbers, the weights 1."""
    total = measure.total(search.worker.model)
    for t in trials:
        o = t.objectives
        if t.status == "complete" and "latency" in o and 0 <= t.score <= 1:
            # all of the base trained with AdamW: weights, gradients and two moments in fp32
            scales = (float(total), 1.0, 16.0 * total)
            t.pscp = choose.pscp(t.score, o["parameters"], o["latency"] - 1, o["memory"], scales=scales, weights=(1.0, 1.0, 1.0))


def check_model(model: nn.Module) -> None:
    """Raise AdapterError unless a bare model is given."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"plans are chosen for a torch module, not {short(model)}")
    if any("_veneer_state" in m.__dict__ for m in model.modules()):
        raise AdapterError("adapters are attached to this model", fix="vn.detach(model) first: candidates are compared on the bare base")


def check_objectives(objectives: Any) -> tuple[str, ...]:
    found = (objectives,) if isinstance(objectives, str) else tuple(objectives)
    for o in found:
        if o not in OBJECTIVES:
            raise ConfigError(f"there is no objective {short(o)}", where="objectives", fix=did_you_mean(str(o), OBJECTIVES))
    if "score" not in found:
        raise ConfigError("the objectives lack 'score'", where="objectives", fix="A front without it would be the empty plan")
    return tuple(dict.fromkeys(found))


def _check_numbers(**values: Any) -> None:
    for key, value in values.items():
        if not finite(value) or value <= 0:
            raise ConfigError(f"{key} must be a positive number, not {short(value)}", where=key)


def steps_of(data: Data, steps: Any, epochs: float, batch_size: int) -> int:
    """Steps of training in full."""
    if steps is None:
        return max(1, math.ceil(epochs * math.ceil(len(data.train) / batch_size)))
    if not whole(steps):
        raise ConfigError(f"steps must be a whole number of at least 1, not {short(steps)}", where="steps")
    return steps


def beside_of(beside: Any, data: Data) -> Plan | None:
    """The plan that every candidate has besides."""
    if beside == "auto":
        return holder("tensor")(at="head") if data.classes else None
    return None if beside is None else Plan.from_dict(beside, "beside")


def describe(worker: Worker, space: Space, budget: budgets.Budget, sampler: str, halving: bool, objectives: tuple[str, ...]) -> dict[str, Any]:
    """How to repeat the search; a folder goes on only with the same."""
    config = getattr(worker.model, "config", None)
    metric = worker.data.metric
    data = worker.data
    return {
        "model": getattr(config, "_name_or_path", "") or type(worker.model).__name__,
        "parameters": measure.total(worker.model),
        "train_examples": len(data.train), "evaluation_examples": len(data.evaluation), "classes": data.classes,
        "metric": metric if isinstance(metric, str) else getattr(metric, "__name__", "own"),
        "steps": worker.steps, "batch_size": worker.batch_size, "warmup": worker.warmup, "weight_decay": worker.weight_decay,
        "space": space.describe(), "beside": None if space.beside is None else space.beside.to_dict(),
        "budget": {k: v for k, v in budget.words.items() if k not in ("minutes", "trials")},
        "sampler": sampler, "halving": halving, "objectives": list(objectives), "seed": worker.seed,
    }  # fmt: skip


def device_words(model: nn.Module) -> str:
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


def _with(budget: budgets.Budget, **changes: Any) -> budgets.Budget:
    import dataclasses

    return dataclasses.replace(budget, **changes)
