"""lm-evaluation-harness with the adapter attached: a task of one's own, on local data, checked by hand."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import veneer as vn
from veneer.cli import app
from veneer.eval.harness import harness
from veneer.serve.opened import open_folder

TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [{"question": f"the number {i} is", "choices": [f"after {i - 1}", f"before {i + 2}"], "answer": i % 2} for i in range(2, 14)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (folder / "numbers.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


def accuracy(opened):
    """The same by hand: the choice whose tokens the model finds likelier after the question."""
    hits = 0
    for row in ROWS:
        likely = []
        for choice in row["choices"]:
            asked = opened.tokenizer(row["question"], add_special_tokens=False).input_ids
            ids = opened.tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                log = opened.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likely.append(sum(float(log[i - 1, ids[i]]) for i in range(len(asked), len(ids))))
        hits += likely.index(max(likely)) == row["answer"]
    return hits / len(ROWS)


def test_with_and_without_the_adapter(runs, tasks, tmp_path):
    opened = open_folder(runs["lora"])
    done = CliRunner().invoke(
        app, ["eval", str(runs["lora"]), "--tasks", "numbers", "--include", str(tasks), "--base", "--out", str(tmp_path / "s.json")], env={"COLUMNS": "160"}
    )
    assert done.exit_code == 0, (done.output, done.exception)
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    [mine], [base] = scores["adapter"], scores["base"]
    assert mine["metric"] == "acc" and mine["rows"] == len(ROWS) and mine["error"] > 0
    assert mine["value"] == pytest.approx(accuracy(opened))
    opened.use([])
    assert base["value"] == pytest.approx(accuracy(opened))
    assert f"{mine['value']:.4f}" in done.output and "numbers" in done.output


def test_a_rehearsal_finds_the_tasks_and_measures_none(runs, tasks, tmp_path):
    options = ["--include", str(tasks), "--out", str(tmp_path / "s.json"), "--dry-run"]
    done = CliRunner().invoke(app, ["eval", str(runs["lora"]), "--tasks", "numbers", *options])
    assert done.exit_code == 0 and done.output == "would measure numbers\n" and not (tmp_path / "s.json").exists()


def test_refusals(runs, tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **k: TaskManager(**{**k, "include_defaults": False}))  # 15,000 take 11 s to list
    opened = open_folder(runs["lora"])
    with pytest.raises(vn.ConfigError, match="no task 'numbrs'.*Did you mean"):
        harness(opened, ["numbrs"], include=str(tasks))
    with pytest.raises(vn.CapabilityError, match="no language model"):
        harness(open_folder(runs["bert"]), ["numbers"], include=str(tasks))
    (tasks / "rows.jsonl").rename(tasks / "gone.jsonl")
    with pytest.raises(vn.DataError, match="data of a task cannot be had"):
        harness(opened, ["numbers"], include=str(tasks))
