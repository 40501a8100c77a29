"""Tables of text: csv, tsv, json, jsonl, parquet files, or a dataset of the hub, row by row, with errors that name the row."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean

TEXT = ("text", "sentence", "content", "tweet", "review", "document", "message")
LABEL = ("label", "labels", "sentiment", "category", "class", "target")
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Table:
    """Texts, and, where there are any, their labels as strings. `names` are the labels in sorted order."""

    texts: list[str]
    labels: list[str] | None
    source: str

    @property
    def names(self) -> list[str]:
        return sorted(set(self.labels or ()))

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: list[int]) -> Table:
        """The given rows."""
        return replace(self, texts=[self.texts[i] for i in rows], labels=[self.labels[i] for i in rows] if self.labels is not None else None)

    def split(self, first: int, second: int, seed: int) -> tuple[Table, Table]:
        """Two disjoint samples, each with the labels in the table's own proportions where it has labels.

        Raises: DataError where the table has not that many rows.
        """
        import random

        if first + second > len(self):
            raise DataError(f"{first} + {second} rows are wanted and there are {len(self)}", where=self.source, fix="Ask for fewer")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        if self.labels is None:
            return self.take(order[:first]), self.take(order[first : first + second])
        # by turns from each label, in proportion: the quota of a row is its place within its label
        seen: Counter[str] = Counter()
        total = Counter(self.labels)
        place = {}
        for i in order:
            place[i] = (seen[self.labels[i]] + 0.5) / total[self.labels[i]]
            seen[self.labels[i]] += 1
        order.sort(key=lambda i: place[i])
        return self.take(sorted(order[:first])), self.take(sorted(order[first : first + second]))


def read_table(
    source: str, *, text: str | None = None, label: str | None = None, labelled: bool = True, encoding: str = "utf-8", split: str = "train"
) -> Table:
    """The table at `source`: a file (csv, tsv, json, jsonl, parquet) or a dataset's name on the hub.

    text, label  columns; by default the first of the usual names that is there
    labelled     whether labels are wanted

    Raises: DataError, naming file, row and reason: no such file, a wrong encoding, a column that is missing, an empty
    text or label, no rows, or only one label.
    """
    path = Path(source)
    if path.suffix.lower() in ENDINGS or path.exists():
        rows = _file_rows(path, encoding)
    else:
        rows = _hub_rows(source, split)
    texts, labels = [], []
    columns: tuple[str, str | None] | None = None
    for number, row in rows:
        where = f"{source}, row {number}"
        if columns is None:
            found = _column(row, text, TEXT, "text", where)
            columns = found, _column(row, label, LABEL, "label", where) if labelled else None
        value = row.get(columns[0])
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"column {columns[0]!r} holds no text but {value!r}", where=where, fix="Take the row out, or name another column")
        texts.append(value)
        if columns[1] is not None:
            mark = row.get(columns[1])
            if mark is None or not str(mark).strip():
                raise DataError(f"column {columns[1]!r} is empty", where=where, fix="Give every row a label")
            labels.append(str(mark).strip())
    if not texts:
        raise DataError("there are no rows", where=source)
    table = Table(texts, labels if labelled else None, source)
    if labelled and len(table.names) < 2:
        raise DataError(f"there is only one label, {table.names[0]!r}", where=source, fix="A classifier needs two labels or more")
    return table


def _column(row: dict[str, Any], wanted: str | None, usual: tuple[str, ...], what: str, where: str) -> str:
    if wanted is not None:
        if wanted not in row:
            raise DataError(f"there is no column {wanted!r}", where=where, fix=did_you_mean(wanted, map(str, row)))
        return wanted
    lower = {str(k).lower(): k for k in row}
    for name in usual:
        if name in lower:
            return lower[name]
    raise DataError(f"no column looks like the {what}", where=where, fix=f"Name it with data.{what}=…; columns: {', '.join(map(str, row))}")


def _file_rows(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number, row)."""
    if not path.exists():
        raise DataError(
            "there is no such file",
            where=str(path),
            fix=f"Nearby: {did_you_mean(path.name, [p.name for p in path.parent.glob('*')] if path.parent.exists() else [])}",
        )
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise DataError(f"files that end in {kind!r} are not known", where=str(path), fix=f"Known: {', '.join(ENDINGS)}")
    if kind == ".parquet":
        from datasets import Dataset

        for i, row in enumerate(Dataset.from_parquet(str(path)), 1):  # type: ignore[arg-type]
            yield i, dict(row)  # type: ignore[call-overload]
        return
    try:
        with open(path, encoding=encoding, newline="") as f:
            if kind in (".csv", ".tsv"):
                reader = csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ",")
                for row in reader:
                    if None in row:
                        raise DataError("more fields than columns", where=f"{path}, line {reader.line_num}", fix="Quote fields that hold the separator")
                    yield reader.line_num, row
            elif kind == ".jsonl":
                for i, line in enumerate(f, 1):
                    if line.strip():
                        yield i, _mapping(json.loads(line), f"{path}, line {i}")
            else:
                data = json.load(f)
                for i, row in enumerate(data if isinstance(data, list) else [data], 1):
                    yield i, _mapping(row, f"{path}, item {i}")
    except UnicodeDecodeError as e:
        raise DataError(
            f"not {encoding}: byte {e.object[e.start]:#x} at offset {e.start}", where=str(path), fix="Name its encoding: data.encoding=latin-1"
        ) from None
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON: {e}", where=str(path)) from None
    except LookupError as e:
        raise ConfigError(str(e), where="data.encoding") from None


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"a row is a mapping from columns to values, not {type(row).__name__}", where=where)
    return row


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import ClassLabel, load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as e:  # the library raises many kinds for 'not there'
        raise DataError(
            f"neither a file nor a dataset that can be loaded: {e}", where=name, fix="Give a path that ends in .csv, .tsv, .json, .jsonl or .parquet"
        ) from e
    classes = {k: f for k, f in data.features.items() if isinstance(f, ClassLabel)}  # type: ignore[union-attr]
    for i, row in enumerate(data, 1):
        yield i, {k: classes[k].int2str(v) if k in classes else v for k, v in dict(row).items()}  # type: ignore[call-overload]
