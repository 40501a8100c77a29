"""Tables: the rows of a source in one format, each with the place that it came from, and what was skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .formats import FORMATS, BadRow, Format, detect
from .sources import read_rows


@dataclass(frozen=True)
class Table:
    """Rows of one format.

    rows     mappings with the format's field names; format: its name
    source   the file, folder or dataset; places: where in it each row is, for errors
    skipped  (place, reason) of rows that were left out; empty unless on_error is 'skip'
    """

    rows: list[dict[str, Any]]
    source: str
    format: str = "text-label"
    places: list[str] = field(default_factory=list)
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def texts(self) -> list[str]:
        """The column `text`."""
        return [row["text"] for row in self.rows]

    @property
    def labels(self) -> list[Any] | None:
        """The column `label`, or None where the format has none."""
        return [row["label"] for row in self.rows] if self.rows and "label" in self.rows[0] else None

    @property
    def names(self) -> list[str]:
        """The labels that occur, in sorted order; also those in lists of labels."""
        return sorted({name for value in self.labels or () for name in (value if isinstance(value, list) else [value])})

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, i: int) -> str:
        return self.places[i] if i < len(self.places) else f"{self.source}, row {i + 1}"

    def take(self, rows: Iterable[int]) -> Table:
        """The given rows."""
        rows = list(rows)
        return replace(self, rows=[self.rows[i] for i in rows], places=[self.place(i) for i in rows])

    def split(self, first: int, second: int, seed: int) -> tuple[Table, Table]:
        """Two disjoint samples, each with the labels in the table's own proportions where each row has one label.

        Raises: DataError where the table has not that many rows.
        """
        import random

        if first + second > len(self):
            raise DataError(f"{first} + {second} rows are wanted and there are {len(self)}", where=self.source, fix="Ask for fewer")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        labels = self.labels
        if labels is None or any(isinstance(v, list) for v in labels):
            return self.take(order[:first]), self.take(order[first : first + second])
        # by turns from each label, in proportion: the quota of a row is its place within its label
        seen: Counter[str] = Counter()
        total = Counter(labels)
        place = {}
        for i in order:
            place[i] = (seen[labels[i]] + 0.5) / total[labels[i]]
            seen[labels[i]] += 1
        order.sort(key=lambda i: place[i])
        return self.take(sorted(order[:first])), self.take(sorted(order[first : first + second]))


def read_table(
    source: str,
    *,
    formats: Iterable[str] = ("text-label",),
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    text: str | None = None,
    label: str | None = None,
    encoding: str = "utf-8",
    split: str = "train",
    subset: str | None = None,
    on_error: str = "stop",
    quotes: bool = True,
) -> Table:
    """The table at `source`: a file (csv, tsv, json, jsonl, txt, also compressed; parquet), a folder of pictures or sounds with one folder
    for each label, a folder that `datasets` saved, or a dataset's name on the hub.

    formats      those that may be found, in order; format: the one that it is
    columns      field -> column, where the usual names are not used; `text` and `label` are short for two of them
    split        of a dataset; subset: its configuration's name
    on_error     'stop': the first bad row is an error; 'skip': it is left out and counted in `Table.skipped`
    quotes       whether fields of csv and tsv may stand in quotes

    Raises: DataError, naming file, row and reason: no such file, a wrong encoding, a column that is missing, an empty
    text or label, no rows; ConfigError for an unknown format or field.
    """
    named = dict(columns or {}) | {k: v for k, v in (("text", text), ("label", label)) if v is not None}
    accepted = [format] if format is not None else list(formats)
    if format is not None and format in FORMATS and formats and format not in formats:
        raise ConfigError(f"this task does not take {format}", where="data.format", fix=f"It takes {', '.join(formats)}")
    folder = Path(source).parent if os.path.isfile(source) else Path()  # a file that may not be looked at is told by its reader
    rows, places, skipped = [], [], []
    found: tuple[Format, dict[str, str]] | None = None
    for place, row in read_rows(source, encoding=encoding, split=split, subset=subset, quotes=quotes):
        try:
            if isinstance(row, BadRow):
                raise row
            if found is None:
                found = detect(row, accepted, named, place)
            rows.append(found[0].read(row, found[1], folder))
            places.append(place)
        except BadRow as bad:
            if on_error != "skip":
                raise bad.at(place) from None
            skipped.append((place, bad.reason))
    if not rows:
        reason = f"there are no rows; {len(skipped)} were skipped, the first for: {skipped[0][1]}" if skipped else "there are no rows"
        raise DataError(reason, where=source, fix="A table has a line with the columns' names and at least one row" if not skipped else "")
    assert found is not None
    return Table(rows, source, found[0].name, places, tuple(skipped))
