"""The documentation does what it says: its Python runs, its commands parse, and the site builds."""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
import typer

from veneer.cli import app
from veneer.data.builtin import model_path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("README.*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = [p for p in PAGES if p.parent != ROOT and "```python" in p.read_text(encoding="utf-8")]
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def bert(name: str, num_labels: int = 2, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZE, num_labels=num_labels)).to(dtype).eval()


def llama(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, vocab_size=99)).to(dtype).eval()


@pytest.mark.parametrize("page", PYTHON, ids=named)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of the page, one after another, with small models in place of the hub's."""
    tokenizer = tf.AutoTokenizer.from_pretrained(model_path("minilm"))
    for cls, make in ((tf.AutoModelForSequenceClassification, bert), (tf.AutoModelForCausalLM, llama), (tf.AutoTokenizer, lambda name: tokenizer)):
        own = cls.from_pretrained
        monkeypatch.setattr(cls, "from_pretrained", lambda name, own=own, make=make, **kw: own(name, **kw) if Path(name).is_dir() else make(name, **kw))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(page), "exec"), scope)


def commands(page: Path) -> list[str]:
    return re.findall(r"^\$ (veneer .*)$", page.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=named)
def test_the_commands_of_a_page_parse(page):
    """Each verb and option is there, and values are of its kind; nothing is carried out."""
    program = typer.main.get_command(app)
    for line in commands(page):
        _, verb, *args = shlex.split(line.partition(" < ")[0])
        assert verb in program.commands, line
        program.commands[verb].make_context(verb, args)


def test_the_site_builds(tmp_path):
    """With --strict, so a link to nothing is an error; and the made pages hold what they must."""
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def page(name):
        return re.sub(r"<[^>]+>", "", (tmp_path / "site" / "reference" / f"{name}.html").read_text(encoding="utf-8"))

    import veneer as vn

    both = page("python") + page("methods")
    assert not [n for n in vn.__all__ if n not in both]
    for verb in typer.main.get_command(app).commands:
        assert f"veneer {verb}" in page("command-line")
    assert "gradient_accumulation" in page("configuration") and "data.limit" in page("configuration")
    assert "that the plan uses, by name: {use: NAME}" in html.unescape(page("configuration"))  # braces are words, not attributes
    assert (tmp_path / "site" / "style.css").exists()
