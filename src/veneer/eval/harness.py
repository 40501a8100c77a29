"""Tasks of lm-evaluation-harness on a base with its adapters attached."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..adapter import disabled
from ..errors import CapabilityError, ConfigError, DataError, did_you_mean
from ..serve.opened import Opened


@dataclass(frozen=True)
class Score:
    """One metric of one task; `error` is its standard error as the harness gives it, None where it gives none."""

    task: str
    metric: str
    value: float
    error: float | None
    rows: int


def harness(
    opened: Opened,
    tasks: list[str],
    *,
    include: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    base: bool = False,
    seed: int = 0,
) -> list[Score]:
    """Scores of the model as it is attached, or of the base alone, by lm-evaluation-harness (Gao et al.).

    tasks       names of the harness's own tasks, or of tasks in `include`, a folder with YAML files
    limit       rows of each task; default: all
    shots       examples in the prompt; default: what the task says
    chat        put the prompts into the tokenizer's chat template
    base        switch the adapters off

    Raises: ConfigError (the harness is not installed, an unknown task), CapabilityError (a model without logits over its
    vocabulary), DataError (a task whose data cannot be had, as without a network).
    """
    manager, model = tasks_of(opened, tasks, include), opened.model
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=opened.tokenizer, batch_size=batch_size)
        try:
            with disabled(model) if base else contextlib.nullcontext():
                found: Any = lm_eval.simple_evaluate(
                    model=lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=shots, apply_chat_template=chat, log_samples=False,
                    random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                )  # fmt: skip
        except (OSError, ConnectionError, FileNotFoundError) as e:
            said = str(e).partition("\n")[0]
            raise DataError(f"the data of a task cannot be had: {said}", where=", ".join(tasks), fix="Fetch it once with a network, or give --include") from e
    return list(_scores(found))


def tasks_of(opened: Opened, tasks: list[str], include: str | None) -> Any:
    """The harness's manager of tasks, which knows `tasks`. Raises: ConfigError, CapabilityError, as `harness`."""
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError("lm-evaluation-harness is not installed", where="--tasks", fix='pip install "veneer[eval]"') from e
    model = opened.model
    if not getattr(model, "can_generate", lambda: False)() or opened.tokenizer is None:
        raise CapabilityError(f"{type(model).__name__} is no language model, which these tasks need", fix="Without --tasks its own metrics are measured")
    with _quiet():
        manager = TaskManager(include_path=include, include_defaults=False) if include is not None else TaskManager()
        if not set(tasks) <= set(manager.all_tasks) and include is not None:
            manager = TaskManager(include_path=include)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"there is no task {name!r}", where="--tasks", fix=did_you_mean(name, manager.all_tasks))
    return manager


def _scores(found: dict[str, Any]) -> Iterator[Score]:
    for task, values in found["results"].items():
        rows = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric} ({kind})"
                yield Score(task, label, float(value), float(error) if isinstance(error, (int, float)) else None, rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells of each of its steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
