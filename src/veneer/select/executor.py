"""Where jobs run: one after another in this process, together in one race, or through Ray Tune on as many machines as Ray has."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from ..errors import ConfigError, did_you_mean

Outcome = dict[str, Any]


class Executor(Protocol):
    """Runs jobs with a worker and yields (index, outcome) as they end, in whatever order; an outcome is plain data and
    the same wherever the job ran."""

    def __call__(self, worker: Callable[[Any], Outcome], jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]: ...


def local(worker: Callable[[Any], Outcome], jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
    """One after another, here."""
    for i, job in enumerate(jobs):
        yield i, worker(job)


def ray(worker: Callable[[Any], Outcome], jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
    """Each job is a trial of Ray Tune, on the cluster that RAY_ADDRESS names or on one of this machine's own.

    The worker (model and data) goes to the object store once for each call. Where Ray has GPUs each job gets one. Raises: ConfigError where
    ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("ray is not installed", where="executor", fix='pip install "veneer[ray]"')
    import ray as cluster  # pyright: ignore[reportMissingImports]
    from ray import tune  # pyright: ignore[reportMissingImports]

    if not cluster.is_initialized():
        cluster.init(log_to_driver=False, include_dashboard=False)
    gpu = 1 if cluster.cluster_resources().get("GPU", 0) else 0

    def trial(config: dict[str, Any], worker: Any, jobs: Any) -> dict[str, Any]:
        return {"outcome": worker(jobs[config["index"]])}

    bound = tune.with_parameters(trial, worker=worker, jobs=list(jobs))
    tuner = tune.Tuner(
        tune.with_resources(bound, {"cpu": 1, "gpu": gpu}),
        param_space={"index": tune.grid_search(list(range(len(jobs))))},
        run_config=tune.RunConfig(verbose=0),
    )
    for result in tuner.fit():
        index = result.config["index"]  # type: ignore[index]
        if result.error is not None:
            yield index, {"status": "failed", "why": f"{type(result.error).__name__}: {str(result.error).strip().splitlines()[-1]}", "seconds": 0.0}
        else:
            yield index, result.metrics["outcome"]  # type: ignore[index]


def race(worker: Any, jobs: Sequence[Any], graph: bool = False) -> Iterator[tuple[int, Outcome]]:
    """Together on one base, as rows of the same batches (race.py): pays where one candidate leaves the machine idle.

    graph  record a training step as a CUDA graph, which pays where the launches of small operations are the limit
    """
    from .together import together

    return together(worker, jobs, graph)


EXECUTORS: dict[str, Executor] = {"local": local, "race": race, "ray": ray}


def find(name: Any, graph: bool = False) -> Executor:
    """The executor of that name, or `name` itself where it is one; `graph` is the race's. Raises: ConfigError."""
    if not isinstance(graph, bool):
        raise ConfigError(f"graph is {graph!r}", where="graph", fix="Give true or false")
    if graph and name != "race":
        raise ConfigError("graph records the steps of a race", where="graph", fix="Give executor='race' with it, or leave it out")
    if graph:
        return functools.partial(race, graph=True)
    if callable(name):
        return cast(Executor, name)
    if name not in EXECUTORS:
        raise ConfigError(f"there is no executor {name!r}", where="executor", fix=did_you_mean(str(name), EXECUTORS))
    return EXECUTORS[name]
