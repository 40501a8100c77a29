"""Answers in text against what the rows say."""

from __future__ import annotations

import pytest

import veneer as vn
from bases import example, make_bases, make_data
from veneer.eval.generated import generated, last
from veneer.serve.predict import Predictor
from veneer.train.config import make_config
from veneer.train.run import run


def test_answers_are_compared_with_the_rows_own(tmp_path, monkeypatch):
    small = make_bases(tmp_path / "bases"), make_data(tmp_path)
    for name in ("text_to_text", "chat"):
        run(make_config(example(name, *small, tmp_path / name, max_steps=1)), quiet=True)
        predictor = Predictor(tmp_path / name)
        told = []
        found = {s.metric: s.value for s in generated(predictor, most=4, batch_size=3, note=lambda *n, told=told: told.append(n))}
        of = len(_rows(predictor))
        assert told == [*((n, of) for n in range(3, of, 3)), (of, of)]
        assert found.keys() == {"exact", "rouge_l", "chrf"} and all(0 <= v <= 1 for v in found.values())
        # answers that are the rows' own, but for one
        rows = [{"text": predictor.answer.expected(r)} for r in _rows(predictor)]
        monkeypatch.setattr(predictor, "rows", lambda *a, rows=rows, **k: iter([{"text": "no such word"}, *rows[1:]]))
        found = {s.metric: s.value for s in generated(predictor)}
        assert "found" not in found and found["exact"] == found["rouge_l"] == 1 - 1 / len(rows) and found["exact"] - 0.3 < found["chrf"] < 1
        # the first character of each: of the wrong answer it is another, or there is none
        monkeypatch.setattr(predictor, "rows", lambda *a, rows=rows, **k: iter([{"text": "?!"}, *rows[1:]]))
        found = {s.metric: s.value for s in generated(predictor, find=r"^(\w)")}
        assert found["found"] == 1 - 1 / len(rows)
        with pytest.raises(vn.DataError, match="'zzz' finds nothing in the own answer of row 1"):
            generated(predictor, find="zzz")
    run(make_config(example("classify", *small, tmp_path / "classify", max_steps=1)), quiet=True)
    with pytest.raises(vn.CapabilityError, match="text-classification does not answer in text"):
        generated(Predictor(tmp_path / "classify"))


def test_what_a_pattern_finds_last():
    number = r"-?\d[\d,]*(?:\.\d+)?"
    assert last(number, "2 + 3 = 5, so\n#### 1,005") == last(number, "That makes 1005.00.") == 1005.0
    assert last(number, "None at all") is None and last("(yes|no) *$", "no, or yes ") == "yes"
    with pytest.raises(vn.ConfigError, match="is not a regular expression"):
        last("(", "text")


def _rows(predictor):
    from veneer.train.prepare import tables

    return tables(predictor.config)[1].rows
