"""What a row may look like. A format is one entry of `FORMATS`: its fields, and the column names that they usually have.

A format is found from the columns of the first row, among those that the task takes, or named with `data.format`. Every
row then becomes a mapping with the format's own field names, whatever its columns were called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool"}


class BadRow(Exception):
    """A row that cannot be used, and why; whoever reads the file adds where."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix

    def at(self, where: str) -> DataError:
        return DataError(self.reason, where=where, fix=self.fix or "Mend the row, or skip such rows: data.on_error=skip")


# -- kinds of values ----------------------------------------------------------------------------------------------------
def _text(value: Any, column: str, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"column {column!r} holds no text but {_short(value)}", "Take the row out, name another column, or skip such rows: data.on_error=skip")
    return value


def _maybe_text(value: Any, column: str, folder: Path) -> str:
    return value if isinstance(value, str) else ""


def _label(value: Any, column: str, folder: Path) -> Any:
    """A string; a list of strings where a row has several labels (or none)."""
    return [_class(v, column) for v in value] if isinstance(value, (list, tuple)) else _class(value, column)


def _class(value: Any, column: str) -> str:
    """A label's name. A whole number is one label however it is held: a missing value turns a column of integers into floats."""
    if isinstance(value, (list, tuple, Mapping)):
        raise BadRow(f"column {column!r} holds no label but {_short(value)}")
    if value is None or value != value or not str(value).strip():  # NaN is no label
        raise BadRow(f"column {column!r} is empty", "Give every row a label, or skip such rows: data.on_error=skip")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _words(value: Any, column: str, folder: Path) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not words or any(w is None for w in words):
        raise BadRow(f"column {column!r} holds no list of tokens but {_short(value)}")
    return [str(w) for w in words]


def _list(value: Any, column: str, folder: Path) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v.strip() for v in value):
        raise BadRow(f"column {column!r} holds no list of texts but {_short(value)}")
    return list(value)


def _messages(value: Any, column: str, folder: Path) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow(f"column {column!r} holds no list of messages but {_short(value)}")
    out = []
    for i, m in enumerate(value, 1):
        role = m.get("role", m.get("from")) if isinstance(m, Mapping) else None
        content = m.get("content", m.get("value")) if isinstance(m, Mapping) else None
        if role not in ROLES:
            raise BadRow(f"message {i} in column {column!r} has the role {_short(role)}", f"Roles: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"message {i} in column {column!r} holds no text but {_short(content)}")
        out.append({"role": ROLES[role], "content": content})
    return out


def _answer(value: Any, column: str, folder: Path) -> Any:
    """Text, or messages."""
    return _text(value, column, folder) if isinstance(value, str) else _messages(value, column, folder)


def _file(value: Any, column: str, folder: Path) -> dict[str, Any]:
    """{'path': …} or {'bytes': …}, as datasets gives undecoded pictures and sounds."""
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        return {"bytes": value["bytes"]} if value.get("bytes") else {"path": str(value["path"])}
    if not isinstance(value, str) or not value:
        raise BadRow(f"column {column!r} names no file but holds {_short(value)}")
    path = folder / value
    if not path.is_file():
        raise BadRow(f"there is no file {str(path)!r}")
    return {"path": str(path)}


def _sides(value: Any, column: str, folder: Path) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) < 2 or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise BadRow(f"column {column!r} holds no pair of texts by language but {_short(value)}")
    return dict(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# -- formats ------------------------------------------------------------------------------------------------------------
Kind = Callable[[Any, str, Path], Any]


@dataclass(frozen=True)
class Field:
    """A value that every row has (unless `optional`), the columns that usually hold it, and what it must be."""

    name: str
    columns: tuple[str, ...]
    kind: Kind = _text
    optional: bool = False


@dataclass(frozen=True)
class Format:
    """A named shape of rows.

    fields   what a row has; `finish` then brings what several formats share into one form (alpaca becomes messages)
    holds    whether the first row's values are of this format, where columns alone do not tell
    """

    name: str
    fields: tuple[Field, ...]
    about: str
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    holds: Callable[[dict[str, Any]], bool] = lambda row: True

    def columns(self, row: Mapping[str, Any], named: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """(field -> column, the fields that have none). `named` is the user's own choice; each column serves once."""
        lower = {str(k).lower(): str(k) for k in row}
        found: dict[str, str] = {f.name: named[f.name] for f in self.fields if f.name in named}
        for f in self.fields:
            if f.name not in found:
                free = (lower[c] for c in f.columns if c in lower and lower[c] not in found.values())
                column = next(free, None)
                if column is not None:
                    found[f.name] = column
        return found, [f.name for f in self.fields if f.name not in found and not f.optional]

    def read(self, row: Mapping[str, Any], columns: Mapping[str, str], folder: Path) -> dict[str, Any]:
        """The row in the format's own field names. Raises: BadRow."""
        out = {}
        for f in self.fields:
            if f.name in columns:
                value = row.get(columns[f.name])
                if value is not None or not f.optional:
                    out[f.name] = f.kind(value, columns[f.name], folder)
        return self.finish(out)


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    asked = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}


def _translation(row: dict[str, Any]) -> dict[str, Any]:
    source, target, *_ = row["translation"].values()
    return {"source": source, "target": target}


def _as(role: str, text: Any) -> Any:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    if len(row["tokens"]) != len(row["tags"]):
        raise BadRow(f"{len(row['tokens'])} tokens and {len(row['tags'])} tags")
    return row


TEXT = ("text", "sentence", "content", "tweet", "review", "document", "message")
LABEL = ("label", "labels", "sentiment", "category", "class", "target", "score")
FIRST = ("sentence1", "premise", "text_a", "text1", "question1", "query", "anchor", "question", "sentence_a")
SECOND = ("sentence2", "hypothesis", "text_b", "text2", "question2", "positive", "passage", "sentence", "answer", "sentence_b")
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "chat")


def _speaks(key: str) -> Callable[[dict[str, Any]], bool]:
    def holds(row: dict[str, Any]) -> bool:
        lists = [v for k, v in row.items() if str(k).lower() in MESSAGES and isinstance(v, (list, tuple)) and v]
        return not lists or any(isinstance(v[0], Mapping) and key in v[0] for v in lists)

    return holds


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "preference",
            (
                Field("prompt", ("prompt", "question", "instruction"), _answer, optional=True),
                Field("chosen", ("chosen",), _answer),
                Field("rejected", ("rejected",), _answer),
            ),
            "a better and a worse answer, each a text or messages, and the prompt where the answers do not hold it",
        ),
        Format("messages", (Field("messages", MESSAGES, _messages),), "a conversation: [{role: user, content: …}, …]", holds=_speaks("role")),
        Format("sharegpt", (Field("messages", MESSAGES, _messages),), "a conversation: [{from: human, value: …}, …]", holds=_speaks("from")),
        Format(
            "alpaca",
            (Field("instruction", ("instruction",)), Field("input", ("input",), _maybe_text, optional=True), Field("output", ("output", "response"))),
            "instruction, input (may be empty), output",
            finish=_alpaca,
        ),
        Format(
            "prompt-completion",
            (Field("prompt", ("prompt", "question", "input"), _answer), Field("completion", ("completion", "response", "answer", "output"), _answer)),
            "a prompt and what should follow it, each a text or messages",
        ),
        Format(
            "tokens",
            (Field("tokens", ("tokens", "words"), _words), Field("tags", ("tags", "ner_tags", "pos_tags", "labels", "ner", "pos"), _words)),
            "a list of words and a list of as many tags (or both as text with spaces)",
            finish=_tagged,
        ),
        Format("text-pair", (Field("text", FIRST), Field("pair", SECOND), Field("label", LABEL, _label)), "two texts and a label or a number"),
        Format(
            "pair",
            (Field("text", FIRST), Field("pair", SECOND), Field("negative", ("negative", "hard_negative"), _maybe_text, optional=True)),
            "two texts that belong together, perhaps a third that does not",
        ),
        Format(
            "translation", (Field("translation", ("translation",), _sides),), "{translation: {en: …, fr: …}}, from the first to the second", finish=_translation
        ),
        Format(
            "text-to-text",
            (Field("source", ("source", "input", "document", "article", "text")), Field("target", ("target", "output", "summary", "label"))),
            "a text and what becomes of it",
        ),
        Format("image", (Field("image", ("image", "img", "file_name", "file", "path"), _file), Field("label", LABEL, _label)), "a picture's file and a label"),
        Format("audio", (Field("audio", ("audio", "sound", "file_name", "file", "path"), _file), Field("label", LABEL, _label)), "a sound's file and a label"),
        Format(
            "choices",
            (
                Field("prompt", ("prompt", "question", "text", "input")),
                Field("choices", ("choices", "options", "answers"), _list),
                Field("label", LABEL, _label),
            ),
            "a prompt, a list of answers, and the right one or its number (from 0)",
        ),
        Format("text-label", (Field("text", TEXT), Field("label", LABEL, _label)), "a text and a label, or a list of labels, or a number"),
        Format("text", (Field("text", TEXT),), "plain text"),
    )
}


def find_format(name: str) -> Format:
    """The format of that name. Raises: ConfigError with the nearest."""
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}", where="data.format", fix=did_you_mean(name, FORMATS))
    return FORMATS[name]


def detect(row: Mapping[str, Any], accepted: Iterable[str], named: Mapping[str, str], where: str) -> tuple[Format, dict[str, str]]:
    """The first of the `accepted` formats whose fields are all in `row`, and its columns. Raises: DataError, ConfigError."""
    formats = [find_format(name) for name in accepted]
    fields = {f.name for fmt in formats for f in fmt.fields}
    for field, column in named.items():
        if field not in fields:
            raise ConfigError(f"there is no field {field!r} here", where="data.columns", fix=did_you_mean(field, sorted(fields)))
        if column not in row:
            raise DataError(f"there is no column {column!r}", where=where, fix=did_you_mean(column, map(str, row)))
    tried = [(fmt, *fmt.columns(row, named)) for fmt in formats]
    for fmt, columns, missing in tried:
        if not missing and set(named) <= set(columns) and fmt.holds(dict(row)):
            return fmt, columns
    fmt, columns, missing = max(tried, key=lambda t: (len(t[1]) - len(t[2]), -formats.index(t[0])))
    what = missing[0] if missing else fmt.fields[0].name
    other = next((f.name for f in FORMATS.values() if f not in formats and len(f.fields) > 1 and not f.columns(row, {})[1] and f.holds(dict(row))), None)
    nested = next((k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)), None) if other is None else None
    raise DataError(
        f"no column looks like the {what}" + (f"; the row looks like {other}, which this task does not take" if other else ""),
        where=where,
        fix=(f"If the rows are the list in {nested!r}, let the file hold that list alone. " if nested else "")
        + f"Name it with data.columns.{what}=…; columns: {', '.join(map(str, row))}; the task takes {', '.join(f.name for f in formats)}",
    )
