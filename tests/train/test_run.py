"""Runs on transformers' Trainer: real tweets, small random models; stopped and gone on with; bad configurations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import veneer as vn
from veneer.serve.predict import Predictor
from veneer.train.config import load_config, make_config
from veneer.train.run import read_run, run


def settings(bases, out, **changes):
    data = {"train": "tweets", "limit": 48, "eval_rows": 40}
    base = {"model": str(bases / "bert"), "plan": "unipelt-apl", "data": data, "output": str(out), "batch_size": 8, "epochs": 2, "learning_rate": 3e-3}
    return base | changes


def weights(folder):
    return load_file(next((folder / "adapter").glob("adapter-*.safetensors")))


def test_a_run_leaves_what_using_it_needs(bases, tmp_path):
    result = run(make_config(settings(bases, tmp_path / "r")), quiet=True)
    assert set(result.metrics) == {"loss", "accuracy", "macro_f1"} and 0 <= result.metrics["accuracy"] <= 1
    found = read_run(tmp_path / "r")
    assert found["labels"] == ["negative", "neutral", "positive"] and found["result"]["trainable"] == result.trainable
    # only the adapter at each checkpoint, never the base
    for checkpoint in (tmp_path / "r" / "checkpoints").glob("checkpoint-*"):
        for file in checkpoint.glob("*.safetensors"):
            assert not any("word_embeddings" in k for k in load_file(file))
        assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))
    predictor = Predictor(tmp_path / "r")
    text = "what a day"
    found = predictor([text])[0]
    assert abs(sum(found["probabilities"].values()) - 1) < 1e-5
    batch = predictor.tokenizer([text], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = result.model.eval()(**batch).logits
    assert predictor.labels[int(logits.argmax())] == found["label"]
    with pytest.raises(vn.ConfigError, match="finished"):
        run(make_config(settings(bases, tmp_path / "r")), quiet=True)
    with pytest.raises(vn.ConfigError, match="another configuration.*seed"):
        run(make_config(settings(bases, tmp_path / "r", seed=5)), quiet=True)


def test_killed_and_gone_on_with_gives_the_same_weights(bases, tmp_path):
    config = settings(bases, tmp_path / "whole", checkpoint_every=2, choose_best=False, plan="mam")  # a prefix with its MLP
    run(make_config(config), quiet=True)
    cut = config | {"output": str(tmp_path / "cut")}
    script = (
        "import json, sys, time; from transformers import TrainerCallback; from veneer.train.run import run; from veneer.train.config import make_config\n"
        "class Slow(TrainerCallback):\n    def on_step_end(self, args, state, control, **k):\n        time.sleep(0.3)\n"
        "run(make_config(json.loads(sys.argv[1])), quiet=True, callbacks=[Slow()])"
    )
    child = subprocess.Popen([sys.executable, "-c", script, json.dumps(cut)], env={**os.environ, "PYTHONWARNINGS": "ignore"})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut" / "checkpoints").glob("checkpoint-4/trainer_state.json")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert read_run(tmp_path / "cut")["result"] is None
    run(make_config(cut), quiet=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_language_modelling(bases, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"the number {i} is after {i - 1}"}) + "\n" for i in range(60)))
    config = load_config(
        "examples/language_model.yaml",
        [f"model={bases / 'llama'}", f"data.train={tmp_path / 't.jsonl'}", f"output={tmp_path / 'r'}", "max_steps=20", "learning_rate=1e-2"],
    )
    result = run(config, quiet=True)
    log = [e["loss"] for e in read_run(tmp_path / "r")["result"]["log"] if "loss" in e]
    assert set(result.metrics) == {"loss"} and log[-1] < log[0] - 0.2
    assert Predictor(tmp_path / "r")(["the number 3"], max_new_tokens=3)[0]["text"].strip()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({"data": {"train": "tweets", "limits": 3}}, "Did you mean 'limit'"),
        ({"epochs": -1}, "epochs.*greater than 0"),
        ({"batch_size": "many"}, "batch_size.*integer"),
        ({"task": "regress"}, "task"),
    ],
)
def test_a_bad_configuration_names_the_key(bases, tmp_path, change, says):
    with pytest.raises(vn.ConfigError, match=says):
        make_config(settings(bases, tmp_path / "r") | change)


def test_nothing_is_written_where_a_run_cannot_start(bases, tmp_path):
    for change, error in (
        ({"plan": {"method": "lora", "r": -1}}, vn.PlanError),
        ({"plan": {"method": "lora", "at": "attn.w"}}, vn.SiteError),
        ({"model": str(tmp_path / "none")}, vn.ConfigError),
        ({"data": {"train": "none.csv"}}, vn.DataError),
    ):
        with pytest.raises(error):
            run(make_config(settings(bases, tmp_path / "r") | change), quiet=True)
        assert not (tmp_path / "r").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(vn.ConfigError, match="not empty"):
        run(make_config(settings(bases, tmp_path / "full")), quiet=True)


def test_overrides(tmp_path):
    config = load_config("examples/classify.yaml", ["learning_rate=1e-2", "data.limit=7", "plan={method: ia3}"])
    assert config.learning_rate == 0.01 and config.data.limit == 7 and config.plan == {"method": "ia3"}
    with pytest.raises(vn.ConfigError, match="key=value"):
        load_config("examples/classify.yaml", ["learning_rate"])
    with pytest.raises(vn.ConfigError, match="no such file"):
        load_config(tmp_path / "no.yaml")
