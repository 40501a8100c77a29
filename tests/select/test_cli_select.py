"""`veneer select` on real MiniLM and real tweets, cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import veneer as vn
from veneer.cli import app
from veneer.select.config import load
from veneer.select.report import Selection

SMALL = ["data.limit=32", "data.eval_rows=30", "max_length=12", "max_steps=2", "select.budget.trials=2", "select.space=singles"]


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "220"})


def test_select_end_to_end(tmp_path):
    out = f"output={tmp_path / 's'}"
    looked = run("select", "examples/select.yaml", "--dry-run", out, *SMALL)
    assert looked.exit_code == 0, looked.output[-2000:]
    assert "fit the budget of parameters" in looked.output and "cheapest: " in looked.output and not (tmp_path / "s").exists()
    done = run("select", "examples/select.yaml", out, *SMALL)
    assert done.exit_code == 0, done.output[-2000:]
    found = Selection.load(tmp_path / "s")
    assert len(found.trials) == 2 and all(t.objectives["parameters"] <= 227_143 for t in found.trials)
    assert "recommended: trial" in done.output and "veneer train" in done.output
    config = yaml.safe_load((tmp_path / "s" / "plan.yaml").read_text())
    assert vn.Plan.from_dict(config["plan"]) == found.recommended and config["learning_rate"] == found.best.rate
    assert "Score against trainable parameters" in (tmp_path / "s" / "report.html").read_text()
    trained = run("train", str(tmp_path / "s" / "plan.yaml"), "--dry-run")
    assert trained.exit_code == 0 and f"trainable {found.best.objectives['parameters']:,.0f} of" in trained.output, trained.output[-2000:]
    other = run("select", "examples/select.yaml", out, *SMALL, "seed=1")
    assert isinstance(other.exception, vn.ConfigError) and "a search with other settings (seed)" in str(other.exception)
    assert Selection.load(tmp_path / "s") == found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["plan=lora"], "'plan' is what a selection finds"),
        (["select.budgets.trials=3"], "there is no key 'select.budgets'"),
        (["select.sampler=tpf"], "select.sampler"),
        (["select=3"], "'select' is a mapping"),
        (["epoch=3"], "Did you mean 'epochs'"),
    ],
)
def test_mistakes_in_the_configuration(changes, says):
    with pytest.raises(vn.ConfigError, match=says):
        load(Path("examples/select.yaml"), changes)


def test_fewer_rows_than_wanted(tmp_path):
    (tmp_path / "few.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    done = run("select", "examples/select.yaml", f"output={tmp_path / 's'}", f"data.train={tmp_path / 'few.csv'}", "data.limit=50", "data.eval_rows=5")
    assert isinstance(done.exception, vn.DataError) and "50 training rows are wanted and 15 are left" in str(done.exception)
