"""Where rows come from: one reader for each kind of file or folder, each yielding (place, row)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean
from .formats import BadRow

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
Rows = Iterator[tuple[str, "dict[str, Any] | BadRow"]]


def read_rows(source: str, *, encoding: str = "utf-8", split: str = "train", subset: str | None = None) -> Rows:
    """The rows of `source` with the place of each: a file by its ending, a folder of pictures or sounds, a dataset that
    `datasets` saved, or one of the hub. A row that cannot be read is a `BadRow`; a file that cannot, a DataError."""
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_dir():
        return _folder(path, split, subset)
    if kind in READERS:
        if not path.exists():
            near = [p.name for p in path.parent.glob("*")] if path.parent.exists() else []
            raise DataError("there is no such file", where=str(path), fix=f"Nearby: {did_you_mean(path.name, near)}")
        return _guarded(path, encoding, READERS[kind])
    if path.exists():
        raise DataError(f"files that end in {kind!r} are not known", where=str(path), fix=f"Known: {', '.join(READERS)}, and folders")
    return _hub(source, split, subset)


def _guarded(path: Path, encoding: str, reader: Callable[[Path, str], Rows]) -> Rows:
    try:
        # a spreadsheet's byte-order mark is no part of the first column's name
        yield from reader(path, "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as e:
        raise DataError(
            f"not {encoding}: byte {e.object[e.start]:#x} at offset {e.start}", where=str(path), fix="Name its encoding: data.encoding=latin-1"
        ) from None
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON: {e}", where=str(path)) from None
    except csv.Error as e:
        raise DataError(f"not a table: {e}", where=str(path)) from None
    except LookupError as e:
        raise ConfigError(str(e), where="data.encoding") from None
    except OSError as e:
        raise DataError(f"cannot be read: {e.strerror or e}", where=str(path)) from None


def _separated(delimiter: str) -> Callable[[Path, str], Rows]:
    def read(path: Path, encoding: str) -> Rows:
        csv.field_size_limit(1 << 30)
        with open(path, encoding=encoding, newline="") as f:
            reader = csv.DictReader(f, delimiter=delimiter)
            names = reader.fieldnames or []
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise DataError(f"two columns are called {twice!r}", where=str(path))
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row:
                    yield place, BadRow("more fields than columns", "Quote fields that hold the separator, or skip such rows: data.on_error=skip")
                else:
                    yield place, row

    return read


def _jsonl(path: Path, encoding: str) -> Rows:
    with open(path, encoding=encoding) as f:
        for i, line in enumerate(f, 1):
            if line.strip():
                place = f"{path}, line {i}"
                try:
                    yield place, _mapping(json.loads(line))
                except json.JSONDecodeError as e:
                    yield place, BadRow(f"not JSON: {e}")


def _json(path: Path, encoding: str) -> Rows:
    with open(path, encoding=encoding) as f:
        data = json.load(f)
    for i, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield f"{path}, item {i}", _mapping(row)


def _lines(path: Path, encoding: str) -> Rows:
    with open(path, encoding=encoding) as f:
        for i, line in enumerate(f, 1):
            if line.strip():
                yield f"{path}, line {i}", {"text": line.rstrip("\n")}


def _parquet(path: Path, encoding: str) -> Rows:
    import pyarrow.lib
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pyarrow.lib.ArrowInvalid as e:
        raise DataError(f"not a parquet file: {str(e).splitlines()[0]}", where=str(path)) from None
    i = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            i += 1
            yield f"{path}, row {i}", row


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
    ".txt": _lines,
}


def _mapping(row: Any) -> dict[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow(f"a row is a mapping from columns to values, not {type(row).__name__}")


def _folder(path: Path, split: str, subset: str | None) -> Rows:
    """A dataset that `save_to_disk` wrote, or one folder of pictures or sounds for each label."""
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, split)
    found = []
    for label in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for file in sorted(p for p in label.rglob("*") if p.suffix.lower() in IMAGES + SOUNDS):
            found.append((str(file), {"image" if file.suffix.lower() in IMAGES else "audio": str(file.resolve()), "label": label.name}))
    if found:
        return iter(found)
    if any(p.suffix.lower() in READERS for p in path.iterdir()):
        return _hub(str(path), split, subset)
    raise DataError(
        "this folder holds no dataset: no folder for each label with pictures or sounds in it, nothing that `datasets` saved, no tables",
        where=str(path),
        fix=f"Put files ({', '.join(IMAGES + SOUNDS)}) into one folder for each label, or name a file",
    )


def _saved(path: Path, split: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(f"there is no split {split!r}", where=str(path), fix=did_you_mean(split, data))
        data = data[split]
    yield from _dataset(data, str(path))


def _hub(name: str, split: str, subset: str | None) -> Rows:
    from datasets import load_dataset

    try:
        data = load_dataset(name, subset, split=split)
    except Exception as e:  # the library raises many kinds for 'not there'
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(
            f"neither a file nor a dataset that can be loaded: {reason}", where=name, fix=f"Give a path that ends in {', '.join(READERS)}, or a folder"
        ) from e
    yield from _dataset(data, f"{name} {split}")


def _dataset(data: Any, source: str) -> Rows:
    """Classes by their names, also within lists; pictures and sounds as files, for whoever uses them to decode."""
    from datasets import Audio, ClassLabel, Image

    for column, feature in data.features.items():
        if isinstance(feature, (Image, Audio)):
            data = data.cast_column(column, type(feature)(decode=False))

    def name(feature: Any, value: Any) -> Any:
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            return value if value is None or value < 0 else feature.int2str(value)
        return [name(inner, v) for v in value] if isinstance(inner, ClassLabel) and isinstance(value, list) else value

    for i, row in enumerate(data, 1):
        yield f"{source}, row {i}", {k: name(data.features[k], v) for k, v in row.items()}
