"""`veneer predict`: use a run on rows that it has never seen."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

NAME = "predict"


def command(
    run: Annotated[str, typer.Argument(help="The folder of a run that `veneer train` or `veneer demo` wrote.")],
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts; for pictures and sounds their files. Default: the lines that come in.")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", help="A file of rows as in training, less what is asked for; or a folder, or a dataset.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Write the answers to this file: .csv and .tsv a table, else a JSON object a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer of a model that generates, in tokens.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 16,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and encode the rows, and answer none.")] = False,
) -> None:
    """Label TEXT, tag it, continue it, answer it: what the run's task is, with its adapter."""
    from pathlib import Path

    from ..errors import ConfigError
    from ..files import write_whole
    from ..serve.predict import Predictor

    if file is not None and text:
        raise ConfigError("both texts and a file are given", where="--file", fix="Give one of them")
    predictor = Predictor(run, model=model)
    if file is not None:
        rows = list(predictor.read(file))
    else:
        lines = text or ([] if sys.stdin.isatty() else [line.strip() for line in sys.stdin if line.strip()])
        rows = predictor.rows_of(lines)
    if dry_run:
        predictor.check(rows, batch_size, max_new_tokens=max_new_tokens)
        typer.echo(f"would answer {len(rows)} rows" + ("" if out is None else f", and write {out}"))
        return
    said: list[dict[str, Any]] = []
    for row, answer in zip(rows, predictor.rows(rows, batch_size, max_new_tokens=max_new_tokens), strict=True):
        given = predictor.given(row)
        said.append({"input": given, **answer})
        if out is None:
            shown = predictor.answer.shown(answer)
            typer.echo(f"{shown}  {_short(given)}" if predictor.answer.echoes else shown)
    if out is not None:
        write_whole(Path(out), written(said, Path(out).suffix.lower()).encode())
        typer.echo(f"{len(said)} answers in {out}")


def written(said: list[dict[str, Any]], suffix: str) -> str:
    """The answers as a file's text: of .csv and .tsv a column for each field of the rows (`input.text`) and of the answers
    (`probabilities.positive`), what is no plain value as JSON; else a JSON object a line."""
    import csv
    import io
    import json

    if suffix not in (".csv", ".tsv"):
        return "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in said)
    flat = [
        {f"{k}.{n}" if n else k: v if isinstance(v, (str, int, float)) else json.dumps(v, ensure_ascii=False) for k, own in s.items() for n, v in _fields(own)}
        for s in said
    ]
    out = io.StringIO()
    table = csv.DictWriter(out, dict.fromkeys(k for line in flat for k in line), delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    return out.getvalue()


def _fields(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else [("", value)]


def _short(given: dict[str, Any]) -> str:
    import json

    value = next(iter(given.values()), "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())[:100]
