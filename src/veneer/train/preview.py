"""What a run would see and cost, before its first step. Nothing is written."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..summary import Summary, summary
from .config import TrainConfig
from .fit import Estimate, estimate, seconds
from .prepare import Prepared, prepare
from .rates import choose

UNEVEN, MUCH = 10, 0.05  # a class with ten times another's rows, and a share of cut rows, that are worth a word
Segments = list[tuple[str, bool]]


@dataclass
class Preview:
    """What `veneer preview` shows.

    samples    rows as pieces of text, each with whether it is learnt
    lengths    of the training rows before they were cut, in tokens (samples of sound): least, median, 95%, most
    cut        how many were cut to `longest`; packed: rows after packing, and the share of their places that is filled
    balance    label -> rows (tokens, for tags), most frequent first
    rate       (learning rate, where it comes from)
    steps      optimiser steps in all; step_seconds: one step, measured; memory: measured on one row of the longest
    notes      what deserves attention
    """

    prepared: Prepared = field(repr=False)
    samples: list[Segments]
    lengths: tuple[int, int, int, int]
    cut: int
    longest: int
    packed: tuple[int, float] | None
    balance: dict[str, int]
    summary: Summary
    rate: tuple[float, str]
    steps: int
    memory: Estimate | None
    step_seconds: float | None
    notes: list[str]


def preview(config: TrainConfig, *, rows: int = 3, measure: bool = True) -> Preview:
    """Load, attach and encode as a run would, show `rows` training rows, and, with `measure`, try a forward and backward
    pass for memory and time. Raises: what `run` raises before its first step."""
    p = prepare(config)
    encoded = p.encoded[0]
    lengths = sorted(encoded.lengths)
    steps = (
        config.max_steps if config.max_steps > 0 else math.ceil(math.ceil(len(p.train) / (config.batch_size * config.gradient_accumulation)) * config.epochs)
    )
    packed = None
    if config.packing:
        packed = len(p.train), sum(min(n, p.task.longest) for n in lengths) / (len(p.train) * p.task.longest)
    rate = (config.learning_rate, "the configuration") if config.learning_rate else choose(p.asked)
    found = Preview(
        p, [p.task.segments(encoded.data[i]) for i in range(min(rows, len(encoded.rows)))],
        (lengths[0], int(statistics.median(lengths)), lengths[int(0.95 * (len(lengths) - 1))], lengths[-1]), encoded.cut, p.task.longest, packed,
        dict(Counter(p.task.marks(p.tables[0].take(encoded.rows))).most_common()), summary(p.model), rate, steps, None, None, [],
    )  # fmt: skip
    if measure:
        _measure(found)
    found.notes.extend(_notes(found))
    return found


def _measure(found: Preview) -> None:
    from .run import Batch, checkpoint, make_trainer

    p, config = found.prepared, found.prepared.config
    order = sorted(range(len(p.train)), key=lambda i: -len(p.train[i]["input_ids"]) if config.packing else -p.encoded[0].lengths[i])
    middle = order[len(order) // 2 :][: config.batch_size]
    small = replace(p, train=p.train.select([order[0], *middle]), evaluation=p.evaluation.select([0]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(small, Path(folder), Batch(config.batch_size, config.gradient_accumulation), [], quiet=True)
        found.memory = estimate(trainer, trainer.train_dataset[0])
        if config.gradient_checkpointing is True or (
            config.gradient_checkpointing == "auto" and getattr(p.model, "supports_gradient_checkpointing", False) and not found.memory.fits(config.batch_size)
        ):
            checkpoint(p.model)
            found.memory = estimate(trainer, trainer.train_dataset[0])
            found.notes.append("gradients are checkpointed: less memory, about a third more time")
        rows = [trainer.train_dataset[i] for i in range(1, len(trainer.train_dataset))] or [trainer.train_dataset[0]]
        found.step_seconds = seconds(trainer, rows) * config.batch_size / len(rows) * config.gradient_accumulation
    p.model.__dict__.pop("forward", None)


def _notes(found: Preview) -> list[str]:
    p, config = found.prepared, found.prepared.config
    out = []
    total = len(p.encoded[0].rows)
    if p.task.cuts == "max_length" and found.longest < config.max_length and found.lengths[3] > found.longest:
        out.append(f"max_length is {config.max_length} and the model takes {found.longest}")
    if found.cut > MUCH * total:
        out.append(
            f"{found.cut} of {total} rows ({found.cut / total:.0%}) are cut to {p.task.measured(found.longest)}; raise {p.task.cuts} if their ends matter"
        )
    if found.balance and max(found.balance.values()) > UNEVEN * min(found.balance.values()):
        most, least = max(found.balance, key=found.balance.__getitem__), min(found.balance, key=found.balance.__getitem__)
        out.append(f"{most!r} has {found.balance[most]} and {least!r} {found.balance[least]}: look at macro-F1, not at accuracy")
    alike: dict[Any, list[str]] = {}
    for name in found.balance:
        alike.setdefault(_plain(name), []).append(name)
    out += [f"{' and '.join(map(repr, names))} are counted as different labels" for names in alike.values() if len(names) > 1]
    for name, e in zip(("training", "evaluation"), p.encoded, strict=True):
        if e.skipped:
            place, why = e.skipped[0]
            out.append(f"{len(e.skipped)} {name} rows are skipped; the first: {why} [{place}]")
    if found.memory is not None and not found.memory.fits(config.batch_size):
        out.append("this does not fit the free memory: a smaller micro-batch will be taken, with more accumulation")
    return out


def _plain(label: str) -> Any:
    """What two labels share that differ in how they are written alone: the number, or the words in small letters."""
    try:
        return float(label)
    except ValueError:
        return " ".join(label.casefold().split())
