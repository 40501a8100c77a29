"""Every example's configuration really runs, and goes on after a break to the same weights, bit for bit."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bases import EXAMPLES, example
from browser import Elements, figures
from veneer.train.config import TaskName, make_config
from veneer.train.run import read_run, run
from veneer.train.tasks import TASKS, find_task


class Break(TrainerCallback):
    """As a kill does, right after a checkpoint is whole."""

    def on_save(self, args, state, control, **kwargs):
        raise ConnectionError("pulled")


def weights(folder):
    return load_file(next((folder / "adapter").glob("adapter-*.safetensors")))


# what the report has of a task's evaluation; of the others a confusion matrix and mistakes
EXPECTED = {
    "multi-label-classification": {"labels", "decisions"}, "regression": {"numbers"}, "sentence-embedding": set(), "dpo": set(),
    "causal-lm": {"samples"}, "chat": {"samples"}, "text-to-text": {"samples"},
    "choice": set(), "text-to-choice": set(), "masked-lm": set(),
}  # fmt: skip


def check_report(folder, metrics):
    """What the report shows of the evaluation adds up to the scores that were computed on their own."""
    assert figures((folder / "report.html").read_text())
    answers = json.loads((folder / "evaluation.json").read_text())
    if "counts" in answers:
        counts = np.array(answers["counts"])
        assert abs(np.trace(counts) / counts.sum() - metrics["accuracy"]) < 1e-6
        assert all(m["truth"] != m["answer"] and m["text"].strip() for m in answers["mistakes"])
        media = json.loads((folder / "run.json").read_text())["config"]["task"] == "image-classification"
        assert all(("picture" in m) == media for m in answers["mistakes"])
        page = Elements((folder / "report.html").read_text())
        assert [i["src"] for i in page.all("img")] == [m["picture"] for m in answers["mistakes"] if media]
    if "decisions" in answers:
        hit, false, missed = np.array(answers["decisions"]).sum(0)
        assert abs(2 * hit / max(1, 2 * hit + false + missed) - metrics["micro_f1"]) < 1e-6
    if "numbers" in answers:
        assert abs(np.abs(np.diff(answers["numbers"])).mean() - metrics["mae"]) < 1e-5
    if read_run(folder)["config"]["task"] == "token-classification":  # the word in question stands in brackets, among its neighbours
        words = {w for m in answers["mistakes"] for w in re.findall(r"\[(.+?)\]", m["text"])}
        assert words and words <= {w for line in Path(read_run(folder)["config"]["data"]["train"]).read_text().splitlines() for w in json.loads(line)["tokens"]}
    assert all(s["prompt"] and s["truth"] for s in answers.get("samples", []))
    return set(answers)


@pytest.mark.parametrize("name", [e.stem for e in EXAMPLES])
def test_an_example_runs_and_goes_on_after_a_break(small, tmp_path, name):
    settings = example(name, *small, tmp_path / "whole", checkpoint_every=2)
    result = run(make_config(settings), quiet=True)
    found = read_run(tmp_path / "whole")
    losses = [e["loss"] for e in found["result"]["log"] if "loss" in e]
    task = find_task(make_config(settings).task)
    assert (
        losses
        and all(math.isfinite(v) for v in [*losses, *result.metrics.values()])
        and task.best in result.metrics
        and result.metrics.keys() <= task.measures.keys()
    )
    assert found["result"]["trainable"] == result.trainable > 0 and found["data"]["train"]["rows"] > 8
    expected = EXPECTED.get(make_config(settings).task, {"labels", "counts", "mistakes"})
    assert check_report(tmp_path / "whole", result.metrics) == expected
    cut = make_config(settings | {"output": str(tmp_path / "cut")})
    with pytest.raises(ConnectionError):
        run(cut, quiet=True, callbacks=[Break()])
    assert read_run(tmp_path / "cut")["result"] is None
    again = run(cut, quiet=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.metrics == result.metrics


@pytest.mark.parametrize("plan", ["lora", "prompt", "prefix"])
def test_the_reference_of_dpo_is_the_base(small, tmp_path, plan):
    """With a plan that is the identity at its start the first loss is log 2; a prompt is not, and moves it a little."""
    result = run(make_config(example("dpo", *small, tmp_path / "a", plan=plan, max_steps=1, warmup=0.0)), quiet=True)
    first = read_run(tmp_path / "a")["result"]["log"][0]["loss"]
    assert abs(first - math.log(2)) < (1e-5 if plan == "lora" else 0.3) and set(result.metrics) == {"loss", "rewards/accuracies", "rewards/margins"}


def test_every_task_has_an_example_and_a_name_in_the_configuration():
    import yaml

    used = {yaml.safe_load(e.read_text()).get("task", "text-classification") for e in EXAMPLES}
    assert used == set(TASKS) == set(TaskName.__args__)
    assert all(find_task(name).name == name for name in TASKS)
