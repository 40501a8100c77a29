"""The command line, as a shell runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veneer.cli import GROUPS, app


def shell(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *args], capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200", **env})


def test_help_imports_no_torch():
    code = """
import sys
sys.argv = ["veneer", "--help"]
from veneer.cli import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("Set up", "Look", "Train", "Use", *(verb.NAME for verbs in GROUPS.values() for verb in verbs)):
        assert word in done.stdout, word


def test_methods_lists_the_registry():
    out = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"}).output
    for name in ("lora", "ia3", "bitfit", "bottleneck", "prefix", "prompt", "full"):
        assert name in out
    assert "mergeable" in out and "2106.09685" in out


def test_inspect_needs_no_weights(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=99,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    done = shell("inspect", str(tmp_path), "--plan", "lora", "--at", "attn.{q,v}@0")
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout and "ffn.gate: layers 0 to 2, 96 x 64" in done.stdout
    assert "trainable 5,376 of" in done.stdout and "model.layers.0.self_attn.v_proj" in done.stdout


def words(line: str) -> str:
    """Without numbers: times and process ids differ from one process to the next."""
    return re.sub(r"\d+", "0", line)


@pytest.fixture(scope="module")
def loading() -> list[str]:
    """What loading transformers prints by itself: it looks for torchao and bitsandbytes, which warn of kernels that they lack here."""
    code = "import transformers.trainer"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stderr.splitlines()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "no.yaml"], "there is no such file [no.yaml]"),
        (["predict", "nowhere", "text"], "this folder is not a run"),
        (["inspect", "nowhere"], "no configuration"),
        (["inspect", "minilm", "--plan", "lara"], "Did you mean 'lora'"),
        (["demo", "--data", "none.csv"], "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, says, loading):
    done = shell(*args)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    *others, last = done.stderr.strip().splitlines()
    assert last.startswith("veneer: ") and says in last
    assert {words(line) for line in others} <= {words(line) for line in loading}


def test_demo_end_to_end(tmp_path):
    """The whole demo on real MiniLM and real tweets, cut short; then its own last line."""
    args = ("demo", "--out", str(tmp_path / "d"), "--train", "32", "--test", "40", "--epochs", "1")
    done = shell(*args)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("lora", "ia3", "bitfit", "bottleneck", "prefix", "prompt", "unipelt-apl"):
        result = json.loads((tmp_path / "d" / name / "run.json").read_text())["result"]
        assert result["trainable"] > 0 and 0 <= result["metrics"]["macro_f1"] <= 1
        assert name in done.stdout and f"{result['trainable']:,}" in done.stdout
    rows = json.loads((tmp_path / "d" / "unipelt-apl" / "gates.json").read_text())["rows"]
    assert len(rows) == 6 * 4 and all(0 < r["mean"] < 1 and r["n"] == 40 for r in rows)
    page = (tmp_path / "d" / "unipelt-apl" / "gates.html").read_text()
    assert "Plotly.newPlot" in page and "bottleneck ffn" in page
    again = shell(*args)  # finished runs are shown again, not trained again
    assert again.returncode == 0 and "unipelt-apl" in again.stdout
    used = shell("predict", str(tmp_path / "d" / "unipelt-apl"), "I would ride in a driverless car any day")
    assert used.returncode == 0 and used.stdout.split()[0] in ("negative", "neutral", "positive"), used.stderr


def test_plain_loop_example(tmp_path):
    script = os.path.abspath("examples/plain_loop.py")
    done = subprocess.run([sys.executable, script, "11"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 10" in done.stdout and "prefix" in done.stdout and (tmp_path / "runs" / "plain-loop" / "adapter.json").exists()
    assert len(Path(script).read_text().splitlines()) < 60


def test_what_other_packages_say_to_programmers_is_not_shown():
    code = """
import logging, sys, warnings
sys.argv = ["veneer", "methods"]
from veneer.cli import main
try:
    main()
except SystemExit:
    pass
logging.getLogger("bitsandbytes.backends").warning("a kernel is missing")
logging.getLogger("torchao").warning("a library is missing")
logging.getLogger("transformers").warning("something of the data")
warnings.warn("will be gone", FutureWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "bitfit" in done.stdout
    assert done.stderr.strip() == "something of the data"
