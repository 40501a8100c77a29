"""What a run writes, against what its rows say: for tasks that answer in text, where the loss says little."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from ..errors import CapabilityError, ConfigError, DataError
from ..serve.answer import Answer, Row
from ..serve.predict import Predictor
from .harness import Score
from .own import rows_for


def generated(
    predictor: Predictor,
    data: str | None = None,
    *,
    base: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    most: int = 64,
    find: str | None = None,
    note: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Greedy answers of at most `most` tokens to the rows that the run held back (or to those of `data`), as `veneer predict`
    gives them, compared with the rows' own by `compared`, and with `find` also by

        found     what that regular expression finds last is the same in both; numbers are compared as numbers

    find   its first group counts, or all that it finds where it has none; an answer in which it finds nothing is wrong
    note   called after each batch with the number of answers so far and of all: writing is slow

    Raises: CapabilityError for a task that answers otherwise, ConfigError (a package is missing, `find` is not a regular
    expression), DataError (`find` finds nothing in a row's own answer).
    """
    from ..adapter import disabled

    rows, wanted, keys = to_write(predictor, data, limit, find)
    with disabled(predictor.model) if base else contextlib.nullcontext():
        said = []
        for a in predictor.rows(rows, batch_size, max_new_tokens=most):
            said.append(a["text"])
            if note is not None and (len(said) % batch_size == 0 or len(said) == len(rows)):
                note(len(said), len(rows))
    scores = compared(said, wanted)
    if find is not None:
        scores["found"] = sum(last(find, a) == k for a, k in zip(said, keys, strict=True)) / len(rows)
    return [Score(predictor.config.task, name, value, None, len(rows)) for name, value in scores.items()]


def to_write(predictor: Predictor, data: str | None, limit: int | None, find: str | None) -> tuple[list[Row], list[str], list[object]]:
    """The rows that are to be answered, their own answers, and what `find` finds in those. Raises: as `generated`."""
    check_writes(predictor.answer, predictor.config.task, "--generate")
    rows = rows_for(predictor, data).rows[:limit]
    wanted = expected(predictor.answer, rows, "--generate")
    keys: list[object] = [] if find is None else [last(find, w) for w in wanted]
    if None in keys:
        raise DataError(
            f"{find!r} finds nothing in the own answer of row {keys.index(None) + 1}",
            where="--find",
            fix=r"Give a pattern that every answer has, as --find '-?\d[\d,]*(?:\.\d+)?' for the last number",
        )
    return rows, wanted, keys


def check_writes(answer: Answer, task: str, where: str) -> None:
    """Raise CapabilityError where `task` does not answer in text, ConfigError where a package that compares is missing."""
    if not answer.writes:
        raise CapabilityError(f"{task} does not answer in text", where=where, fix="Leave it out: its metrics are the run's own")
    for package in ("rouge_score", "sacrebleu"):
        if find_spec(package) is None:
            raise ConfigError(f"the package {package!r} is not installed", where=where, fix='pip install "veneer[eval]"')


def expected(answer: Answer, rows: Sequence[Row], where: str) -> list[str]:
    """The rows' own answers. Raises: CapabilityError where they have none."""
    wanted = [answer.expected(r).strip() for r in rows]
    if not any(wanted):
        raise CapabilityError("plain text has no answers to compare with", where=where, fix="Give rows with a prompt and a completion")
    return wanted


def compared(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """How like `said` is to `wanted`, row by row, each in [0, 1]:

    exact     the same text, but for spaces at its ends
    rouge_l   F1 of the longest common subsequence of words (Lin 2004), a mean over rows; by rouge-score
    chrf      F2 of character n-grams, n = 1…6, over all rows (Popović 2015); by sacrebleu
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_chrf

    said, rouge = [s.strip() for s in said], RougeScorer(["rougeL"])
    return {
        "exact": sum(a == b for a, b in zip(said, wanted, strict=True)) / len(said),
        "rouge_l": sum(rouge.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted, strict=True)) / len(said),
        "chrf": corpus_chrf(said, [list(wanted)]).score / 100,
    }


def last(find: str, text: str) -> str | float | None:
    """What the regular expression `find` finds last in `text`: its first group, or all of it; as a number where it is one
    ("1,000" is 1000.0), None where there is nothing. Raises: ConfigError for what is not a regular expression."""
    try:
        *_, match = [None, *re.finditer(find, text)]
    except re.error as e:
        raise ConfigError(f"{find!r} is not a regular expression: {e}", where="--find") from None
    if match is None:
        return None
    text = (match[1] if match.re.groups else match[0]) or ""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text.strip()
