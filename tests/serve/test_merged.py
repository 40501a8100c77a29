"""Plain checkpoints: read back by transformers alone, and refused where a method does not merge."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import veneer as vn
from veneer.cli import app
from veneer.example import example as probe
from veneer.serve.measure import output
from veneer.serve.merged import write_merged
from veneer.serve.opened import open_folder


@pytest.mark.parametrize(("run", "auto"), [("lora", AutoModelForCausalLM), ("ia3", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)])
def test_from_pretrained_loads_the_merged_model(runs, tmp_path, run, auto):
    wanted = open_folder(runs[run])
    inputs = probe(wanted.model)
    done = write_merged(open_folder(runs[run]), tmp_path / "plain")
    plain = auto.from_pretrained(tmp_path / "plain")
    assert torch.allclose(output(plain, inputs), output(wanted.model, inputs), atol=1e-4)
    assert done.difference.largest < 1e-4 and done.difference.effect > 1e-2
    assert not any("_veneer" in k for k in plain.state_dict()) and "veneer" not in type(plain).__module__
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("a day").input_ids == wanted.tokenizer("a day").input_ids
    if run == "bert":
        assert list(plain.config.id2label.values()) == ["negative", "neutral", "positive"]


def test_rounding_is_measured(runs, tmp_path):
    full, half = (write_merged(open_folder(runs["lora"]), tmp_path / d, d) for d in ("fp32", "bf16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16
    assert full.difference.largest < half.difference.largest < 0.5 and half.dtype == "bfloat16"


def test_what_does_not_merge_is_refused_with_a_way_out(runs, tmp_path):
    with pytest.raises(vn.CapabilityError, match="cannot be merged.*settle"):
        write_merged(open_folder(runs["gated"]), tmp_path / "m")
    with pytest.raises(vn.ConfigError, match="no dtype 'bf17'.*Did you mean 'bf16'"):
        write_merged(open_folder(runs["lora"]), tmp_path / "m", "bf17")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(vn.StoreError, match="something here already"):
        write_merged(open_folder(runs["lora"]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    opened = open_folder(runs["lora"])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(opened.tokenizer), "save_pretrained", full)
    with pytest.raises(vn.StoreError, match="cannot write: No space left on device.*MiB are free"):
        write_merged(opened, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_limit_of_the_system_is_told_whoever_meets_it(runs, tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000,) * 2); import veneer.cli; veneer.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "merge", str(runs["lora"]), str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 2 and "veneer: cannot write: File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_compares_and_keeps_nothing(runs, tmp_path):
    run, to = str(runs["lora"]), str(tmp_path / "m")
    before = sorted(runs["lora"].rglob("*"))
    for command in (["merge", run, to], ["convert", run, to], ["export", run, "--to", "peft"], ["export", run, "--to", "safetensors", "--out", to]):
        done = CliRunner().invoke(app, [*command, "--dry-run"])
        assert done.exit_code == 0 and "would write" in done.output and "differs by at most" in done.output, done.output
    assert not list(tmp_path.iterdir()) and sorted(runs["lora"].rglob("*")) == before
    with pytest.raises(vn.StoreError, match="something here already"):
        CliRunner().invoke(app, ["merge", run, run, "--dry-run"], catch_exceptions=False)


def test_from_the_shell(runs, tmp_path):
    done = CliRunner().invoke(app, ["merge", str(runs["lora"]), str(tmp_path / "m")])
    assert done.exit_code == 0 and "output differs by at most" in done.output and "(float32)" in done.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.model_type == "llama"
    done = CliRunner().invoke(app, ["merge", str(runs["gated"]), str(tmp_path / "n")])
    assert done.exit_code == 1 and isinstance(done.exception, vn.CapabilityError)
