"""A run's folder, loaded for use: texts or files in, answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.formats import BadRow, detect, find_format
from ..data.sources import read_rows
from ..errors import ConfigError, DataError
from ..train.prepare import longest
from ..train.tasks import find_task
from .answer import Row
from .answers import ANSWERS
from .opened import open_folder


class Predictor:
    """The base and the adapter of a finished run, and its task's way to read rows and to answer; all it needs is read from
    the run's folder.

    model   the base, where it lies elsewhere now

    Raises: ConfigError (not a run, or a bare adapter, which knows no task), StoreError (the adapter's files).
    """

    def __init__(self, folder: str | Path, model: str | None = None) -> None:
        opened = open_folder(folder, model=model)
        if opened.config is None:
            raise ConfigError("a bare adapter does not say what its task is", where=str(folder), fix="Give a run's folder, or use veneer chat, merge or export")
        self.opened, self.config, self.labels = opened, opened.config, opened.labels
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.task = find_task(self.config.task)(self.config)
        self.task.labels, self.task.model, self.task.tools = self.labels, self.model, self.tokenizer
        self.task.longest = longest(self.config, self.model, self.tokenizer, opened.adapter)
        self.task.ready()
        self.answer = ANSWERS[self.config.task](self.task)

    def __call__(self, texts: Iterable[str], **options: Any) -> list[Row]:
        """Answers to texts (for pictures and sounds: files), as ANSWERS describes them. Raises: DataError."""
        return list(self.rows(self.rows_of(texts), **options))

    def rows_of(self, texts: Iterable[str]) -> list[Row]:
        """Rows of texts, or of files. Raises: DataError where there are none, or one is empty."""
        texts = list(texts)
        if not texts or not all(t.strip() for t in texts):
            raise DataError("there is no text", fix='For example: veneer predict RUN "a sentence"')
        return [self.answer.row(t) for t in texts]

    def given(self, row: Row) -> Row:
        """What of a row was not a blank to fill."""
        return {k: v for k, v in row.items() if k not in self.answer.blanks}

    @torch.no_grad()
    def rows(self, rows: Iterable[Row], batch_size: int = 16, **options: Any) -> Iterator[Row]:
        """Answers to rows in the fields of the task's formats, `batch_size` at a time, in their order."""
        waiting: list[Row] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == batch_size:
                yield from self.answer(waiting, **options)
                waiting = []
        if waiting:
            yield from self.answer(waiting, **options)

    def check(self, rows: list[Row], batch_size: int = 16, **options: Any) -> None:
        """Encode rows as for `rows`, without an answer. Raises: DataError for one that cannot be used."""
        for i in range(0, len(rows), batch_size):
            self.answer.check(rows[i : i + batch_size], **options)

    def read(self, source: str, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
        """The rows of a file, a folder or a dataset, as in training; what is asked for need not be there.

        columns  field -> column; default: the run's own

        Raises: DataError with the place of a row that cannot be used.
        """
        d = self.config.data
        named = dict(columns or ({} if columns is not None else {**d.columns, **{k: v for k, v in (("text", d.text), ("label", d.label)) if v is not None}}))
        folder = Path(source).parent if Path(source).is_file() else Path()
        formats = [d.format] if d.format is not None else [*self.task.formats, *self.answer.formats]
        found: Any = None
        for place, raw in read_rows(source, encoding=d.encoding, split=d.eval_split, subset=d.subset, quotes=d.quotes):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                full = self._filled(raw, formats, named)
                if found is None:
                    found = detect(full, formats, {k: v for k, v in named.items() if v in full}, place)
                yield found[0].read(full, found[1], folder)
            except BadRow as bad:
                raise bad.at(place) from None
        if found is None:
            raise DataError("there are no rows", where=source)

    def _filled(self, raw: Row, formats: list[str], named: Mapping[str, str]) -> Row:
        """`raw` with a value for each field that it may lack."""
        out = dict(raw)
        lower = {str(k).lower(): k for k in raw}
        for fmt in map(find_format, formats):
            for f in fmt.fields:
                column = named.get(f.name, f.columns[0])
                column = column if column in out else next((lower[c] for c in f.columns if c in lower), column)
                if f.name in self.answer.blanks and out.get(column) in ("", None) and not f.optional:
                    known, _ = fmt.columns(out, {k: v for k, v in named.items() if v in out})
                    row = {name: out[c] for name, c in known.items()}
                    if "tokens" in row and isinstance(row["tokens"], str):
                        row["tokens"] = row["tokens"].split()
                    out[column] = self.answer.blank(f.name, row)
        return out
