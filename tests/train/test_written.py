"""Answers that are written at each evaluation: what they are compared with, and what they change."""

from __future__ import annotations

import json

import pytest

import veneer as vn
from bases import example
from veneer.eval.own import own
from veneer.serve.predict import Predictor
from veneer.train.config import make_config
from veneer.train.prepare import tables
from veneer.train.run import read_run, run
from veneer.train.written import Written


@pytest.mark.parametrize("name", ["text_to_text", "chat", "dpo"])
def test_answers_are_scored_at_each_evaluation_and_change_nothing_else(tmp_path, small, name):
    # in fp32: bf16 in training would round answers of a random base, whose words are near one another, otherwise than Predictor does
    same = {"checkpoint_every": 1, "max_steps": 2, "eval_batch_size": 2, "best_metric": "loss", "bf16": False}
    plain = run(make_config(example(name, *small, tmp_path / "plain", **same)), quiet=True)
    result = run(make_config(example(name, *small, tmp_path / "run", **same, eval_generate=5, max_new_tokens=4)), quiet=True)
    # what is written changes nothing of what is learnt
    assert plain.metrics == {k: v for k, v in result.metrics.items() if k in plain.metrics}
    assert result.metrics.keys() - plain.metrics.keys() == {"exact", "rouge_l", "chrf"}
    samples = json.loads((tmp_path / "run" / "evaluation.json").read_text())["samples"]
    assert len(samples) == 5 and all(s["prompt"] and s["truth"] for s in samples)
    # as `veneer eval` has it on the same rows, when all is done
    predictor = Predictor(tmp_path / "run")
    rows = tables(predictor.config)[1].rows
    assert len(rows) == 8 and [s["truth"] for s in samples] == [predictor.answer.expected(rows[i * 8 // 5]).strip() for i in range(5)]
    said = [a["text"].strip() for a in predictor.rows([rows[i * 8 // 5] for i in range(5)], 2, max_new_tokens=4)]
    assert said == [s["answer"] for s in samples]
    assert {s.metric: s.value for s in own(predictor)} == result.metrics


def test_the_best_checkpoint_is_that_of_the_best_answers(tmp_path, small, monkeypatch):
    scores = iter([{"chrf": 0.2}, {"chrf": 0.9}, {"chrf": 0.5}, {"chrf": 0.9}])
    monkeypatch.setattr(Written, "__call__", lambda self, trainer: next(scores))
    monkeypatch.setattr(Written, "samples", lambda self: [])
    told = {"eval_generate": True, "max_new_tokens": 4, "best_metric": "chrf", "checkpoint_every": 1, "max_steps": 3}
    run(make_config(example("text_to_text", *small, tmp_path / "best", **told)), quiet=True)
    log = read_run(tmp_path / "best")["result"]["log"]
    losses = {e["step"]: e["eval_loss"] for e in reversed(log) if "eval_loss" in e}
    found = read_run(tmp_path / "best")["result"]["metrics"]
    assert [e["eval_chrf"] for e in log if "eval_chrf" in e] == [0.2, 0.9, 0.5, 0.9]
    assert found["loss"] == losses[2] != losses[3]


def test_what_cannot_be_written_is_said_before_the_first_step(tmp_path, small, monkeypatch):
    def refused(name, **changes):
        with pytest.raises(vn.VeneerError) as e:
            run(make_config(example(name, *small, tmp_path / name, **changes)), quiet=True)
        assert not (tmp_path / name).exists()
        return str(e.value)

    assert "text-classification does not answer in text [eval_generate]" in refused("classify", eval_generate=4)
    assert "plain text has no answers to compare with [eval_generate]" in refused("language_model", eval_generate=True)
    assert "over the model's 256" in refused("chat", eval_generate=True, max_new_tokens=250)
    assert "gives no 'chrf'" in refused("chat", best_metric="chrf") and "eval_generate=true" in refused("chat", best_metric="chrf")
    assert "'macro_f1'" in refused("classify", best_metric="macro-f1")
    monkeypatch.setattr("veneer.eval.generated.find_spec", lambda name: None)
    assert 'pip install "veneer[eval]"' in refused("chat", eval_generate=True)
