"""A run's own metrics, on the rows that it held back or on others."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from ..adapter import disabled
from ..data.builtin import table
from ..data.packing import pack
from ..serve.predict import Predictor
from ..train.prepare import Prepared, encode, tables
from ..train.run import Batch, make_trainer, reported
from .harness import Score


def own(predictor: Predictor, data: str | None = None, *, base: bool = False) -> list[Score]:
    """The scores of the run's task, computed as at the end of its training.

    data   a file, folder or dataset of rows as in training; default: the rows that the run held back
    base   switch the adapter off (a head that the base lacks is then as it was drawn)

    Raises: DataError (data that is not there, labels that training never saw).
    """
    config, task = predictor.config, predictor.task
    rows = rows_for(predictor, data)
    encoded = encode(task, rows)
    ready: Any = encoded.data
    if config.packing:
        from datasets import Dataset

        ready = Dataset.from_list(pack(ready.to_list(), task.longest))
    adapter = predictor.opened.adapter
    both: Any = (rows, rows), (encoded, encoded)
    p = Prepared(config, predictor.model, predictor.tokenizer, adapter.plan, adapter, adapter.plan, ready, ready, predictor.labels, task, *both)
    with tempfile.TemporaryDirectory() as aside, disabled(p.model) if base else contextlib.nullcontext():
        trainer = make_trainer(p, Path(aside), Batch(config.batch_size, 1), [], quiet=True)
        found = reported(p, trainer.evaluate())
    return [Score(config.task, name, value, None, len(encoded.rows)) for name, value in found.items()]


def rows_for(predictor: Predictor, data: str | None) -> Any:
    """The table `data`, or the rows that the run held back. Raises: DataError."""
    return tables(predictor.config)[1] if data is None else rows_like_training(predictor, data)


def rows_like_training(predictor: Predictor, data: str) -> Any:
    """The table `data`, read as the run's own. Raises: DataError."""
    d, task = predictor.config.data, predictor.task
    rows = table(
        data, text=d.text, label=d.label, encoding=d.encoding, formats=task.formats, format=d.format, columns=d.columns, split=d.eval_split,
        subset=d.subset, on_error=d.on_error, quotes=d.quotes,
    )  # fmt: skip
    check_labels(task, rows)
    return rows


def check_labels(task: Any, rows: Any) -> None:
    """Raise DataError for labels that training never saw."""
    from ..errors import DataError

    extra = sorted(set(task.names(rows)) - set(task.labels))
    if extra:
        raise DataError(
            f"labels that training never saw: {', '.join(extra[:10])}", where=rows.source, fix=f"Take those rows out; it knows {', '.join(task.labels)}"
        )
