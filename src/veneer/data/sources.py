"""Where rows come from: one reader for each kind of file or folder, each yielding (place, row)."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean
from .formats import BadRow

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
SEPARATORS = ",;\t|"
QUOTES = "Double a quote within quotes; where quotes are letters like others: data.quotes=false; or skip such rows: data.on_error=skip"
PEEK = 4096  # characters that show whether a file is one list
Rows = Iterator[tuple[str, "dict[str, Any] | BadRow"]]


def read_rows(source: str, *, encoding: str = "utf-8", split: str = "train", subset: str | None = None, quotes: bool = True) -> Rows:
    """The rows of `source` with the place of each: a file by its ending (compressed ones too), a folder of pictures or sounds,
    a dataset that `datasets` saved, or one of the hub. A row that cannot be read is a `BadRow`; a file that cannot, a DataError."""
    path = Path(source)
    try:
        yield from _reader(path, source, encoding, split, subset, quotes)
    except UnicodeDecodeError as e:
        raise DataError(
            f"not {encoding}: byte {e.object[e.start]:#x}",
            where=_undecoded(path, encoding),
            fix="Name the file's encoding (data.encoding=latin-1, cp1252, utf-16, …), or mend that place",
        ) from None
    except UnicodeError as e:  # of codecs that refuse before the first byte
        raise DataError(f"not {encoding}: {e}", where=str(path), fix="Name the file's encoding: data.encoding=…") from None
    except LookupError as e:
        raise ConfigError(str(e), where="data.encoding", fix="For example utf-8, latin-1, cp1252 or utf-16") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise DataError(f"cannot be read: {getattr(e, 'strerror', None) or e}", where=str(path)) from None


def _reader(path: Path, source: str, encoding: str, split: str, subset: str | None, quotes: bool) -> Rows:
    packed = path.suffix.lower() in OPENERS
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if path.is_dir():
        return _folder(path, split, subset)
    if kind in READERS and not (packed and kind == ".parquet"):
        if not path.exists():
            near = [p.name for p in path.parent.glob("*")] if path.parent.exists() else []
            raise DataError("there is no such file", where=str(path), fix=f"Nearby: {did_you_mean(path.name, near)}")
        if kind == ".parquet":
            return _parquet(path)
        with _opener(path)(path, "rb") as f:
            begins = f.read(4)
        return READERS[kind](Text(path, _marked(begins, encoding), quotes))
    if path.exists():
        raise DataError(
            f"files that end in {path.suffix.lower()!r} are not known",
            where=str(path),
            fix=f"Known: {', '.join(READERS)}, all but the last also with {', '.join(OPENERS)}, and folders",
        )
    return _hub(source, split, subset)


@dataclass(frozen=True)
class Text:
    """A file of text to be read: its encoding, and whether its fields (csv, tsv) may be quoted."""

    path: Path
    encoding: str
    quotes: bool

    def open(self, newline: str | None = None) -> Any:
        return _opener(self.path)(self.path, "rt", encoding=self.encoding, newline=newline)


def _opener(path: Path) -> Any:
    return OPENERS.get(path.suffix.lower(), open)


def _marked(begins: bytes, encoding: str) -> str:
    """`encoding`, or what the file's own byte-order mark says where that was left at UTF-8: no UTF-8 begins like the others,
    and a spreadsheet's UTF-8 mark is no part of the first column's name."""
    if encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
        return encoding
    return next((name for mark, name in MARKS if begins.startswith(mark)), encoding)


def _undecoded(path: Path, encoding: str) -> str:
    """The place of the first line that is not in `encoding`; a decoder counts from its own buffer's start."""
    if "\n".encode(encoding) != b"\n":
        return str(path)
    with _opener(path)(path, "rb") as f:
        for i, line in enumerate(f, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return f"{path}, line {i}"
    return str(path)


def _separated(separator: str) -> Callable[[Text], Rows]:
    """Rows under a heading. Where the heading holds another separator and not this one, it is that (a semicolon, where the
    comma is the decimal point)."""

    def read(file: Text) -> Rows:
        csv.field_size_limit(1 << 30)
        with file.open(newline="") as f:
            first = next((line for line in f if line.strip()), "")
            own = next((c for c in (separator, *SEPARATORS) if c in first), separator)
            f.seek(0)
            reader = csv.reader(f, delimiter=own, strict=True, quoting=csv.QUOTE_MINIMAL if file.quotes else csv.QUOTE_NONE)
            names: list[str] = []
            while True:
                place = f"{file.path}, line {reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    yield place, BadRow(f"a quote is not closed, or something stands after it: {e}", QUOTES)
                    continue
                if not names:
                    names = [n.strip() for n in fields] if any(map(str.strip, fields)) else []
                    twice = next((n for n in names if n and names.count(n) > 1), None)
                    if twice is not None:
                        raise DataError(f"two columns are called {twice!r}", where=str(file.path), fix="Rename one of them")
                elif any(fields[len(names) :]):
                    yield place, BadRow("more fields than columns", "Quote fields that hold the separator, or skip such rows: data.on_error=skip")
                elif fields:
                    yield place, {n: v for n, v in zip_longest(names, fields[: len(names)]) if n}

    return read


def _jsonl(file: Text) -> Rows:
    with file.open() as f:
        if re.match(r"\s*\[\s*\{", f.read(PEEK)):  # one list of mappings, as a .json holds it
            yield from _whole(file)
            return
        f.seek(0)
        for i, line in enumerate(f, 1):
            if line.strip():
                place = f"{file.path}, line {i}"
                try:
                    yield place, _mapping(json.loads(line))
                except json.JSONDecodeError as e:
                    comma = "A line is a mapping, with no comma after it; mend it" if e.msg == "Extra data" else "Mend the row"
                    yield place, BadRow(f"not JSON: {e.msg}, column {e.colno}", f"{comma}, or skip such rows: data.on_error=skip")


def _json(file: Text) -> Rows:
    with file.open() as f:
        first = next((line for line in f if line.strip()), "")
        more = any(line.strip() for line in f)
    try:
        by_line = more and isinstance(json.loads(first), dict)  # as a .jsonl holds it
    except json.JSONDecodeError:
        by_line = False
    return _jsonl(file) if by_line else _whole(file)


def _whole(file: Text) -> Rows:
    try:
        with file.open() as f:
            text = f.read()
        data = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as e:
        fix = "A list of mappings, or a mapping a line"
        raise DataError(f"not JSON: {e.msg}, column {e.colno}", where=f"{file.path}, line {e.lineno}", fix=fix) from None
    for i, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield f"{file.path}, item {i}", _mapping(row)


def _lines(file: Text) -> Rows:
    with file.open() as f:
        for i, line in enumerate(f, 1):
            if line.strip():
                yield f"{file.path}, line {i}", {"text": line.rstrip("\n")}


def _parquet(path: Path) -> Rows:
    import pyarrow.lib
    import pyarrow.parquet as pq

    i = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                i += 1
                yield f"{path}, row {i}", row
    except pyarrow.lib.ArrowException as e:
        raise DataError(f"not a parquet file: {str(e).splitlines()[0]}", where=str(path)) from None


READERS: dict[str, Callable[[Any], Rows]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".txt": _lines,
    ".parquet": _parquet,
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

    try:
        data = load_from_disk(str(path))
    except IndexError as e:  # it saves a dataset without rows so that it cannot be opened
        raise DataError("a dataset without rows", where=str(path), fix="Save it again with save_to_disk") from e
    except Exception as e:  # the library, pyarrow and json each raise their own
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"a dataset that cannot be opened: {reason}", where=str(path), fix="Save it again with save_to_disk") from e
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
