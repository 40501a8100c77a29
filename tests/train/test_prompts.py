"""Prompts compared: each score is what typing the prompt gives, and the search is no worse than where it began."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

import veneer as vn
from using import bases  # noqa: F401  a fixture
from veneer.cli import app
from veneer.train.config import make_config
from veneer.train.prompts import compare_prompts, without, written

SETTINGS = {"task": "causal-lm", "plan": {"method": "prompt", "length": 2}, "max_steps": 4, "batch_size": 8, "choose_best": False, "learning_rate": 0.5}


@pytest.fixture
def settings(bases, tmp_path):  # noqa: F811
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the number {i} is after {i - 1}"}) + "\n" for i in range(30)))
    data = {"train": str(tmp_path / "texts.jsonl"), "eval_rows": 8}
    return SETTINGS | {"model": str(bases / "llama"), "data": data, "output": str(tmp_path / "out"), "max_length": 24, "eval_batch_size": 8}


def test_prompts_of_a_language_model(settings, tmp_path):
    found = {c.kind: c for c in compare_prompts(make_config(settings), ["count the numbers"], rows=8, steps=2, tries=6, candidates=4)}
    assert set(found) == {"soft", "none", "written", "nearest", "searched"}
    table = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [r["kind"] for r in table["rows"]] == list(found) and table["search"]["searched"] <= table["search"]["nearest"]
    assert found["none"].text is None and found["written"].text == "count the numbers" and found["nearest"].text

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(settings["model"]) for c in (AutoModelForCausalLM, AutoTokenizer))
    from veneer.train.prepare import prepare

    p = prepare(make_config(settings))
    batch = p.task.collator()([dict(r) for r in p.evaluation])
    typed = torch.tensor(tokenizer("count the numbers", add_special_tokens=False)["input_ids"])[None].expand(len(batch["input_ids"]), -1)
    ids = torch.cat([typed, batch["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(typed), batch["attention_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, typed.shape[1] :]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found["written"].metrics["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_the_command_shows_a_table(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"output": str(tmp_path / "cli")}))
    shown = CliRunner().invoke(app, ["prompts", str(tmp_path / "run.yaml"), "--text", "count", "--rows", "8", "--steps", "1", "--tries", "2"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("soft", "none", "written", "'count'", "nearest", "searched", "loss"))
    with pytest.raises(vn.ConfigError, match="0 soft prompts.*plan=prompt"):
        list(compare_prompts(make_config(settings | {"plan": "lora"})))


def test_a_plan_with_another_prompt_or_none():
    plan = (vn.gated(vn.PTuning(4, before_cls=True) + vn.LoRA(2)) >> vn.Bottleneck(4)).to_dict()
    fixed = vn.Plan.from_dict(written(plan, "say"))
    assert str(fixed) == str(vn.gated(vn.PromptTuning(None, init="text", text="say", fixed=True, before_cls=True) + vn.LoRA(2)) >> vn.Bottleneck(4))
    assert vn.Plan.from_dict(without(plan)) == vn.gated(vn.LoRA(2)) >> vn.Bottleneck(4)
    assert without(vn.PromptTuning(3).to_dict()) is None
