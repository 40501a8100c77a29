"""From a configuration to what a selection works on: the bare model, its data, and the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..attach import detach
from ..errors import ConfigError, DataError
from ..plan import Plan
from ..train.config import TrainConfig
from ..train.prepare import Prepared, prepare
from ..train.tasks import find_task
from ..train.trainer import AdapterTrainer
from .config import SelectSection
from .report import Selection

TRAIN = "train"  # the folder, within the selection's, that its plan.yaml trains into


def bare(config: TrainConfig) -> tuple[Prepared, Plan | None]:
    """(the model, without anything attached, with data and task; what every candidate has besides: a fresh head).

    Raises: ConfigError for a task whose loss is not the model's own, DataError for fewer rows than data.limit, and what
    train.prepare raises.
    """
    kind = find_task(config.task)
    if kind.loss is not None or kind(config).trainer() is not AdapterTrainer:
        raise ConfigError(f"plans cannot be selected for {config.task}, whose loss is not the model's own", where="task", fix="Train them one by one")
    if config.quantization is not None or config.packing:
        raise ConfigError(
            "a selection takes neither packing nor a quantised base yet", where="packing" if config.packing else "quantization", fix="Leave it out"
        )
    p = prepare(config.model_copy(update={"plan": "head" if kind.head else "lora"}))
    detach(p.model)
    if config.data.limit is not None and len(p.train) < config.data.limit:
        raise DataError(
            f"{config.data.limit} training rows are wanted and {len(p.train)} are left beside the {len(p.evaluation)} held out", where="data.limit",
            fix=f"Ask for {len(p.train)} at most, or hold fewer out (data.eval_rows)",
        )  # fmt: skip
    return p, p.plan if kind.head else None


def arguments(config: TrainConfig, section: SelectSection, p: Prepared, beside: Plan | None) -> dict[str, Any]:
    """The keyword arguments of vn.select."""
    rows = config.batch_size * config.gradient_accumulation
    return {
        "budget": section.budget or None, "space": section.space, "beside": beside, "objectives": section.objectives, "metric": section.metric,
        "collate": p.task.collator(), "epochs": config.epochs, "steps": config.max_steps if config.max_steps > 0 else None, "batch_size": rows,
        "eval_batch_size": config.eval_batch_size, "warmup": config.warmup, "weight_decay": config.weight_decay, "sampler": section.sampler,
        "halving": section.halving, "finalists": section.finalists, "executor": section.executor, "graph": section.graph,
        "seed": config.seed, "folder": config.output,
    }  # fmt: skip


def finish(found: Selection, config: TrainConfig, section: SelectSection) -> Path:
    """Write selection.json, plan.yaml (the whole configuration, for `veneer train`) and report.html; return the folder."""
    from ..report.selection import report

    rest = config.model_dump(mode="json", exclude_unset=True, exclude={"plan", "learning_rate", "output"})
    found.config = rest | {"output": str(Path(config.output) / TRAIN)}
    folder = found.save(config.output)
    report(folder)
    return folder
