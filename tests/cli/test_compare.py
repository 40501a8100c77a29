"""`veneer compare` and `veneer report`: runs side by side, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import veneer as vn
from browser import check_drawn
from veneer.cli import app
from veneer.report.compare import differences, read_runs, table
from veneer.report.over import over


def write_run(folder: Path, scores: list[float], finished: bool = True, **config: object) -> Path:
    """A run's folder as `veneer train` leaves it, with the log of as many evaluations as there are scores."""
    log = [{"step": 10 * i + 5, "loss": 1 / (i + 1), "learning_rate": 1e-3 / (i + 1), "epoch": i} for i in range(len(scores))]
    log += [{"step": 10 * i + 10, "eval_loss": 1.1 / (i + 1), "eval_accuracy": s, "eval_runtime": 1.0} for i, s in enumerate(scores)]
    result = {"metrics": {"loss": 0.3, "accuracy": max(scores)}, "trainable": 1000 * len(scores), "share": 0.01, "seconds": 61.5, "log": log}
    run = {"config": {"model": "m", "plan": {"method": "lora"}, "data": {"train": "t"}, "output": str(folder)} | config, "plan": {"method": "lora"}}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run | {"labels": [], "result": result if finished else None}))
    if not finished:
        (folder / "checkpoints" / "checkpoint-20").mkdir(parents=True)
        (folder / "checkpoints" / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "lora[red]", [0.5, 0.7, 0.8], learning_rate=1e-3, seed=0),
        write_run(tmp_path / "<b>ia3</b>", [0.4, 0.6], learning_rate=1e-2, seed=0),
        write_run(tmp_path / "cut", [0.3], finished=False, learning_rate=1e-3, seed=0),
    ]


def invoke(*args: object, columns: int = 160):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": str(columns)})


def test_table_and_page(runs, tmp_path):
    done = invoke("compare", *runs, "--page", tmp_path / "c.html")
    assert done.exit_code == 0, done.output
    for words in ("lora[red]", "<b>ia3</b>", "cut (at step 10)", "0.8", "3,000", "1.000%", "LoRA()", "learning_rate: lora[red] 0.001, <b>ia3</b> 0.01"):
        assert words in done.output, words
    assert "seed" not in done.output  # the same in all
    figures = check_drawn(tmp_path / "c.html")
    names = [[t.name for t in f.data] for f in figures]
    assert ["lora[red]", "&lt;b&gt;ia3&lt;/b&gt;", "cut"] in names
    loss = next(f for f in figures if f.layout.yaxis.title.text == "training loss")
    assert [list(t.y) for t in loss.data] == [[1, 0.5, 1 / 3], [1, 0.5], [1]]
    points = next(f for f in figures if f.layout.yaxis.title.text == "accuracy" and f.layout.xaxis.title.text == "trainable parameters")
    assert [(t.x[0], t.y[0]) for t in points.data] == [(3000, 0.8), (2000, 0.6)]  # the unfinished one has no score
    assert "<b>ia3" not in (tmp_path / "c.html").read_text()


def test_a_narrow_terminal_keeps_every_number(runs, tmp_path):
    out = invoke("compare", *runs[:2], "--page", tmp_path / "c.html", columns=60).output
    flat = "".join(out.split())
    assert "3,000" in out and "1.000%" in flat and max(len(line) for line in out.splitlines() if "The curves" not in line and ":" not in line) <= 60


def test_seeds_become_a_mean_with_its_deviation(runs, tmp_path):
    more = [write_run(tmp_path / f"lora-{i}", [0.2 * i], learning_rate=1e-3, seed=i) for i in (1, 2, 3)]
    done = invoke("compare", *more, *runs[1:], "--over", "seed", "--page", tmp_path / "c.html")
    lines = [line.split() for line in done.output.splitlines()]
    assert ["lora", "3", "0.3000", "±", "0.0000", "0.4000", "±", "0.2000", "1,000", "62", "s"] in lines
    assert ["<b>ia3</b>", "1", "0.3000", "0.6000", "2,000", "62", "s"] in lines and "cut" not in done.output
    for wrong, says in (("sed", "no run has a key 'sed'.*seed"), ("seed", "none of these runs has finished")):
        with pytest.raises(vn.ConfigError, match=says):
            over(read_runs(more if wrong == "sed" else runs[2:]), wrong)


def test_what_is_missing_is_a_dash_not_a_zero(runs):
    heads, rows = table(read_runs(runs))
    assert rows[2][heads.index("accuracy")] is None and rows[2][heads.index("state")] == "at step 10"
    assert differences(read_runs(runs[:1]))[0] == ["run"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora", r"there is no such folder .*The nearest run is .*lora\[red\]"),
        ("", r"not a run: it has no run.json .*It holds runs: .*cut"),
        ("cut/checkpoints", r"not a run: it has no run.json .*The nearest run is .*cut"),
    ],
)
def test_a_folder_that_is_no_run(runs, tmp_path, name, says):
    with pytest.raises(vn.ConfigError, match=says):
        read_runs([tmp_path / name])
    assert invoke("compare", tmp_path / name, "--page", tmp_path / "c.html").exit_code != 0 and not (tmp_path / "c.html").exists()


def test_damaged_and_foreign_folders(runs, tmp_path):
    (runs[0] / "run.json").write_text('{"config": ')
    with pytest.raises(vn.ConfigError, match="cannot be read"):
        read_runs(runs)
    (runs[0] / "run.json").write_text("[]")
    with pytest.raises(vn.ConfigError, match="not one of ours"):
        read_runs(runs)
    with pytest.raises(vn.ConfigError, match="nothing to compare"):
        read_runs([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(vn.ConfigError, match="Give the folder that"):
        read_runs([tmp_path / "empty" / "x" / "y"])


def test_a_rehearsal_keeps_nothing(runs, tmp_path):
    page = tmp_path / "c.html"
    done = invoke("compare", *runs, "--page", page, "--dry-run")
    assert done.exit_code == 0 and f"would write {page}" in done.output and not page.exists()
    (runs[2] / "report.html").unlink(missing_ok=True)
    done = invoke("report", runs[2], "--dry-run")
    assert done.output == f"would write {runs[2] / 'report.html'}\n" and not (runs[2] / "report.html").exists()


def test_report_writes_the_page_again(runs, tmp_path):
    done = invoke("report", runs[2])
    assert done.exit_code == 0 and "not finished" in (runs[2] / "report.html").read_text()
    (tmp_path / "none").mkdir()
    done = invoke("report", tmp_path / "none")
    assert isinstance(done.exception, vn.ConfigError) and "no run and no selection" in str(done.exception)
