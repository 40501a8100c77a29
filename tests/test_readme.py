"""README and docs tell the truth: names exist, files exist, the snippet runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import veneer as vn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("README.*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MADE = re.findall(r'"([\w-]+)": \w+', (ROOT / "docs" / "hooks.py").read_text().rpartition("PAGES = ")[2])  # pages of the reference


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bvn\.(\w+)", text)):
        assert hasattr(vn, name), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        made = target.startswith("../reference/") and Path(target).stem in MADE
        assert made or (page.parent / target).exists(), target
    for path in re.findall(r"\b((?:benchmarks|examples|tests|src/veneer)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    assert "DEMO_" not in text


def test_the_layout_names_what_is_there():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("src/veneer/\n", 1)[1].split("```")[0]
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        found = [p for p in (ROOT / "src" / "veneer").rglob(name)]
        assert found, name
    for name in re.findall(r"(\w+)/", tree):
        assert (ROOT / "src" / "veneer" / name).is_dir() or (ROOT / name).is_dir(), name


def test_both_languages_say_the_same():
    """The same sections, tables, methods, commands, links, and numbers in digits (but that 22.7M are 2270 times 10,000)."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))

    def parts(text):
        plain = re.sub(r"```.*?```", "", text, flags=re.S)
        numbers = sorted(n.replace(",", "") for n in re.findall(r"\d(?:[\d,.]*\d)?", plain))
        links = [target for target in re.findall(r"\]\(([^)]+)\)", plain) if not target.startswith("README")]
        return re.findall(r"^#+", plain, re.M), sorted(links), sorted(set(re.findall(r"`([^`\n]+)`", plain))), numbers

    ours, theirs = parts(english), parts(chinese)
    assert ours[:3] == theirs[:3]
    assert [n for n in ours[3] if n != "22.7"] == [n for n in theirs[3] if n != "2270"]


def test_the_snippet_runs(tmp_path, monkeypatch):
    """README's Python, as it stands there, on a small model in place of the hub's."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_labels=3))
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda name, **kw: small)
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert snippet is not None
    scope: dict = {}
    exec(compile(snippet.group(1), "README.md", "exec"), scope)
    assert (tmp_path / "adapters" / "tweets" / "adapter.json").exists()
    assert len([p for p in scope["report"].parts if p["kept"]]) == 2
    assert not any("_veneer" in n for n, _ in small.named_modules())
