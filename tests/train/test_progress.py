"""What a run says while it trains, where else its log goes, and the report that it leaves."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console

import veneer as vn
from browser import check_drawn
from veneer.data.builtin import table
from veneer.report.run import per_class, report
from veneer.train.config import make_config
from veneer.train.progress import Progress
from veneer.train.run import run


@pytest.fixture(scope="module")
def finished(bases, tmp_path_factory):
    """A gated classifier, trained with a tracker; the folder and what stood on the terminal."""
    out = tmp_path_factory.mktemp("runs") / "r"
    data = {"train": "tweets", "limit": 48, "eval_rows": 40}
    settings = {"model": str(bases / "bert"), "plan": "unipelt-apl", "data": data, "output": str(out), "batch_size": 8, "epochs": 2}
    run(make_config(settings | {"learning_rate": 3e-3, "report_to": ["tensorboard"], "seed": 3}), quiet=True)
    return out


def test_a_classifier_leaves_its_report(finished):
    figures = check_drawn(finished / "report.html")
    text = (finished / "report.html").read_text()
    result, answers = json.loads((finished / "run.json").read_text())["result"], json.loads((finished / "evaluation.json").read_text())
    # what the page shows is what was measured
    counts = answers["counts"]
    assert sum(map(sum, counts)) == 40 and abs(sum(counts[i][i] for i in range(3)) / 40 - result["metrics"]["accuracy"]) < 1e-9
    rows = per_class(answers["labels"], counts)
    assert abs(sum(r[3] for r in rows) / 3 - result["metrics"]["macro_f1"]) < 1e-9
    loss = figures[0].data
    assert list(loss[0].y) == [e["loss"] for e in result["log"] if "loss" in e] and [t.name for t in loss] == ["training", "evaluation"]
    gates = json.loads((finished / "gates.json").read_text())["rows"]
    maps = [t for f in figures for t in f.data if t.type == "heatmap"]
    assert len(gates) == 2 * 4 and sorted(z for row in maps[0].z for z in row) == pytest.approx(sorted(r["mean"] for r in gates))
    assert [list(map(int, row)) for row in maps[1].text] == counts
    assert all(m["truth"] != m["answer"] for m in answers["mistakes"]) and answers["mistakes"]
    assert {m["text"] for m in answers["mistakes"]} <= set(table("tweets").texts)  # as they were written, not as tokens
    assert sum(r["parameters"] for r in result["parameters"]) == result["trainable"]
    for needed in (
        "veneer train",
        "learning_rate: 0.003",
        f"torch=={torch.__version__.split('+')[0]} ",
        "accelerate==",
        "processor",
        "peak memory",
        "bottleneck gate",
    ):
        assert needed in text, needed
    assert "How to repeat it" in text and (finished / "config.yaml").exists()


def test_the_configuration_in_the_folder_repeats_the_run(finished, tmp_path):
    from veneer.train.config import load_config

    again = run(load_config(finished / "config.yaml", [f"output={tmp_path / 'again'}", "report_to=[]"]), quiet=True)
    assert again.metrics == json.loads((finished / "run.json").read_text())["result"]["metrics"]


def test_trackers_get_the_log(finished):
    (events,) = (finished / "checkpoints").rglob("events.out.tfevents.*")  # the last evaluation is in the training's own file
    log = events.read_bytes()
    assert all(tag in log for tag in (b"train/loss", b"eval/loss", b"eval/macro_f1"))


@pytest.mark.parametrize(("name", "says"), [("tensorbord", "Did you mean 'tensorboard'"), ("swanlab", "swanlab is not ready.*pip install swanlab")])
def test_a_tracker_that_is_not_there_is_said_before_the_run(bases, tmp_path, name, says):
    settings = {"model": str(bases / "bert"), "data": {"train": "tweets"}, "output": str(tmp_path / "r"), "report_to": [name]}
    with pytest.raises(vn.ConfigError, match=says):
        run(make_config(settings), quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_language_model_leaves_samples_and_an_unfinished_run_a_report(bases, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"the number {i} is after {i - 1}"}) + "\n" for i in range(40)))
    settings = {"model": str(bases / "llama"), "task": "causal-lm", "data": {"train": str(tmp_path / "t.jsonl")}, "output": str(tmp_path / "r")}
    run(make_config(settings | {"max_steps": 4, "batch_size": 4, "checkpoint_every": 2}), quiet=True)
    answers = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert len(answers["samples"]) == 4 and all(s["prompt"].startswith("the number") for s in answers["samples"])
    text = (tmp_path / "r" / "report.html").read_text()
    assert "Samples" in text and "Confusion matrix" not in text and "Mean gate" not in text
    # cut off before the end: the report is what the last checkpoint holds
    data = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(data | {"result": None}))
    text = report(tmp_path / "r").read_text()
    assert "not finished" in text and check_drawn(tmp_path / "r" / "report.html")
    with pytest.raises(vn.ConfigError, match="not a run"):
        report(tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_loss_speed_memory_and_time_left(terminal):
    from types import SimpleNamespace as Box

    out = io.StringIO()
    args = Box(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)
    state = Box(is_world_process_zero=True, global_step=0, max_steps=6, num_input_tokens_seen=0)
    with Progress(console=Console(file=out, force_terminal=terminal, width=160, color_system=None)) as bar:
        bar.on_train_begin(args, state, None)
        for step in range(1, 5):
            state.global_step, state.num_input_tokens_seen = step, 100 * step
            bar.on_step_end(args, state, None)
            bar.on_log(args, state, None, logs={"loss": 2.0 / step})
        bar.bar.refresh()
        for _ in range(3):
            bar.on_prediction_step(args, state, None, eval_dataloader=[1, 2, 3])
        bar.on_log(args, state, None, logs={"eval_loss": 0.25, "eval_accuracy": 0.5, "eval_runtime": 3})
        bar.on_evaluate(args, state, None)
        state.global_step, state.num_input_tokens_seen = 5, 500
        bar.on_step_end(args, state, None)  # alone since the evaluation: speed and time left are those of before
        bar.on_log(args, state, None, logs={"loss": 0.1})
        assert "tokens/s" in bar.facts()
        state.best_global_step = 3
        bar.on_train_end(args, state, None)
        bar.on_log(args, state, None, logs={"eval_loss": 0.2})
    said = out.getvalue()
    assert "? left" not in said and "the best, of step 3: evaluation loss 0.2" in said
    assert terminal or re.search(r"step 5/6: loss 0\.1000, [\d,]+ tokens/s, .*, 0:00:\d\d left", said)
    assert re.search(r"loss 0\.\d{4}, [\d,]+ tokens/s, [\d.]+ [MG]iB", said) and "left" in said
    assert "step 4: evaluation loss 0.25, accuracy 0.5" in said and "runtime" not in said
    assert ("4/6" in said) and (terminal or "step 4/6: loss 0.5000" in said)


def test_quiet_says_nothing():
    from types import SimpleNamespace as Box

    out = io.StringIO()
    state = Box(is_world_process_zero=True, global_step=1, max_steps=6, num_input_tokens_seen=10)
    with Progress(quiet=True, console=Console(file=out, force_terminal=True)) as bar:
        bar.on_train_begin(Box(train_batch_size=1, gradient_accumulation_steps=1, world_size=1), state, None)
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 1.0, "eval_loss": 1.0})
        bar.on_prediction_step(None, state, None, eval_dataloader=[1])
        bar.on_evaluate(None, state, None)
    assert out.getvalue() == ""
