"""Setting up: doctor, schema, shell completion."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import yaml
from typer.testing import CliRunner

import veneer as vn
from veneer import doctor
from veneer.cli import app
from veneer.train.config import TrainConfig, load_config


def test_doctor_finds_this_machine_whole():
    found = {f.what: f for f in doctor.examine()}
    assert found["torch"].says == importlib.metadata.version("torch") and found["extra train"].state == "good"
    assert found["a step"].says == "trained, saved and loaded on cpu" and found["cpu"].state == "good"
    assert not [f for f in found.values() if f.state == "wrong"]
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "a step" in done.output


def test_doctor_names_the_fix(monkeypatch):
    """A full disk, an old transformers, an extra that is absent, a torchvision for another torch."""
    version, spec = importlib.metadata.version, doctor.importlib.util.find_spec

    def versions(name):
        if name == "datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"transformers": "4.57.0", "torchvision": "0.1"}.get(name) or version(name)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.metadata, "version", versions)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5 << 20))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "torchvision" else spec(name))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = {f.what: f for f in doctor.examine()}
    assert found["transformers"].state == "wrong" and "4.57.0, and >=5.0 is needed" in found["transformers"].says
    assert "datasets is not installed" in found["extra train"].says and found["extra train"].fix == 'pip install "veneer[train]"'
    assert found["extra train"].state == "absent" and found["torchvision"].state == "wrong"
    assert "5 MiB are free" in found["this folder"].says and "Delete old runs" in found["this folder"].fix
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    for says in ("4.57.0", 'pip install "transformers>=5.0"', 'pip install "veneer[train]"', "Delete old runs", "Uninstall it, or install the build for torch"):
        assert says in done.output, says


def test_schema_accepts_what_the_configuration_accepts():
    done = CliRunner().invoke(app, ["schema"])
    schema = json.loads(done.output)
    assert schema["additionalProperties"] is False and set(schema["properties"]) == set(TrainConfig.model_fields)
    assert set(schema["required"]) == {k for k, f in TrainConfig.model_fields.items() if f.is_required()}


def test_shell_completion():
    env = {**os.environ, "_VENEER_COMPLETE": "complete_bash", "COMP_WORDS": "veneer me", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['veneer']; from veneer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert sorted(done.stdout.split()) == ["merge", "methods"], done.stderr


def test_init_by_flags_and_by_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "causal-lm", "--model", "my/base", "--data", "rows.jsonl", "--plan", "{method: lora, r: 4, at: linear}", "--output", "runs/x"]
    assert CliRunner().invoke(app, ["init", "a.yaml", *flags]).exit_code == 0
    asked = CliRunner().invoke(app, ["init", "b.yaml", "--task", "causal-lm"], input="my/base\nrows.jsonl\n{method: lora, r: 4, at: linear}\nruns/x\n")
    assert asked.exit_code == 0 and "Base model" in asked.output and "Task" not in asked.output
    a, b = (tmp_path / "a.yaml").read_text(), (tmp_path / "b.yaml").read_text()
    assert a == b
    config = load_config("a.yaml")
    assert config.plan == {"method": "lora", "r": 4, "at": "linear"} and config.data.train == "rows.jsonl" and config.task == "causal-lm"
    assert config == TrainConfig(task="causal-lm", model="my/base", plan=config.plan, output="runs/x", data={"train": "rows.jsonl"})
    # every key is there, and one that loses its # is still a configuration of the same meaning
    for name in (*TrainConfig.model_fields, *TrainConfig.model_fields["data"].annotation.model_fields):
        assert f"{name}: " in a or f"{name}:\n" in a, name
    (tmp_path / "c.yaml").write_text(re.sub(r"^( *)# (?=\w+: )", r"\1", a, flags=re.M))
    assert load_config("c.yaml") == config


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task", "text-classifcation"], "task"),
        (["--plan", "lara"], "Did you mean 'lora'"),
        (["--plan", "{method: lora"], "neither a preset nor YAML"),
    ],
)
def test_init_checks_what_it_is_told(tmp_path, flags, says):
    done = CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml"), "--yes", *flags])
    assert isinstance(done.exception, vn.VeneerError) and says in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_init_asks_again_where_an_answer_is_wrong(tmp_path):
    answers = "text-classifcation\ntext-classification\nminilm\ntweets\nlara\nlora\n\n"
    done = CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml")], input=answers)
    assert done.exit_code == 0 and "Did you mean 'lora'" in done.output and done.output.count("Plan:") == done.output.count("Task [") == 2
    assert load_config(str(tmp_path / "a.yaml")).plan == "lora"


def test_init_overwrites_nothing(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    done = CliRunner().invoke(app, ["init", str(path), "--yes"])
    assert isinstance(done.exception, vn.ConfigError) and "file already" in str(done.exception) and path.read_text() == "mine"
    assert CliRunner().invoke(app, ["init", str(path), "--yes", "--force"]).exit_code == 0 and load_config(path).model == "minilm"


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch, capsys):
    from veneer.cli import main
    from veneer.data.tables import read_table

    place = tmp_path / "closed"
    place.mkdir()
    (place / "a.csv").write_text("text,label\na,x\n")
    place.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:  # whom no right binds
            os.seteuid(65534)
        with pytest.raises(vn.DataError, match="Permission denied.*a.csv"):
            read_table(str(place / "a.csv"))
        monkeypatch.setattr(sys, "argv", ["veneer", "report", str(place / "run")])
        with pytest.raises(SystemExit) as e:
            main()
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o700)
    assert e.value.code == 2 and "veneer: Permission denied [" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["init", "demo", "train", "prompts", "select", "merge", "export", "convert"])
def test_every_verb_that_makes_files_of_its_own_can_be_tried_dry(verb):
    assert "--dry-run" in CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).output


def test_dry_runs_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["init", "--yes", "--dry-run"])
    assert shown.exit_code == 0 and "model: minilm" in shown.output and TrainConfig(**yaml.safe_load(shown.output)).data.train == "tweets"
    shown = CliRunner().invoke(app, ["demo", "--dry-run", "--train", "30", "--test", "30"])
    assert shown.exit_code == 0 and "30 training rows of tweets (negative" in shown.output and "runs/demo/ia3" in shown.output
    (tmp_path / "c.yaml").write_text("model: minilm\ndata: {train: tweets, limit: 20, eval_rows: 5}\nmax_length: 16\nplan: lora\n")
    refused = CliRunner().invoke(app, ["prompts", "c.yaml", "--dry-run"])
    assert isinstance(refused.exception, vn.ConfigError) and "0 soft prompts" in str(refused.exception)
    shown = CliRunner().invoke(app, ["prompts", "c.yaml", "plan=prompt", "--dry-run"])
    assert shown.exit_code == 0 and "prompt" in shown.output and "would write runs/train" in shown.output
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
