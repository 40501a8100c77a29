"""Checks of value for the soft prompts: against PEFT's encoders and task matrices, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer as vn
from helpers import refuses
from test_peft_format import logits, shake, shaken
from zoo import ZOO, loss

TASK = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.detach().abs().max())), rtol=0)


# no LSTM on T5: there PEFT's runs over the prompts of encoder and decoder as one sequence
@pytest.mark.parametrize(("kind", "encoder"), [("bert", "mlp"), ("llama", "mlp"), ("t5", "mlp"), ("bert", "lstm"), ("llama", "lstm")])
def test_p_tuning_is_pefts(kind: str, encoder: str, tmp_path: Path) -> None:
    inputs = ZOO[kind].inputs(2, 7)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=6, encoder_reparameterization_type=encoder.upper(), encoder_num_layers=2, task_type=TASK[kind]
    )
    theirs = shaken(ZOO[kind].build(), config)
    model = ZOO[kind].build()
    adapter = vn.attach(model, vn.PTuning(3, encoder=encoder, hidden=6, before_cls=True))
    (p,) = adapter.parts
    source = theirs.prompt_encoder["default"]
    with torch.no_grad():
        p.vectors.copy_(source.embedding.weight[:3])
        p.mlp.load_state_dict(source.mlp_head.state_dict())
        if encoder == "lstm":
            p.lstm.load_state_dict(source.lstm_head.state_dict())
    ours = logits(model, inputs)
    same(ours, logits(theirs, inputs)[:, -ours.shape[1] :])
    vn.save(model, tmp_path / "a")
    fresh = ZOO[kind].build()
    assert vn.load(fresh, tmp_path / "a").num_parameters == 3 * 32  # the encoder is folded away
    same(logits(fresh, inputs), ours)


def test_multitask_prompts_are_pefts() -> None:
    """Tasks as adapters on rows of one batch, where PEFT is given task_ids."""
    kind = "llama"
    inputs = ZOO[kind].inputs(3, 7)
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, num_ranks=2, task_type=TASK[kind], prompt_tuning_init="RANDOM")
    theirs = shaken(ZOO[kind].build(), config)
    source = theirs.prompt_encoder["default"]
    model = ZOO[kind].build()
    a = vn.attach(model, vn.MultitaskPrompt(3, rank=2, before_cls=True), name="a")
    b = vn.attach(model, vn.MultitaskPrompt(3, rank=2, before_cls=True, shared="a"), name="b", activate=False)
    assert a.parts[0].P is b.parts[0].P
    with torch.no_grad():
        a.parts[0].P.copy_(source.embedding.weight[:3])
        for i, p in enumerate((a.parts[0], b.parts[0])):
            p.u.copy_(source.prefix_task_cols[i])
            p.v.copy_(source.prefix_task_rows[i].t())
        expected = theirs(**inputs, task_ids=torch.tensor([0, 1, 0]))
        expected = getattr(expected, "logits", expected[0])
    with vn.route(model, ["a", "b", "a"]):
        ours = logits(model, inputs)
    same(ours, expected[:, -ours.shape[1] :])


def test_tasks_train_one_prompt_and_a_target_starts_from_them(tmp_path: Path) -> None:
    model = ZOO["bert"].build()
    a = vn.attach(model, vn.MultitaskPrompt(3), name="a")
    b = vn.attach(model, vn.MultitaskPrompt(3, shared="a"), name="b", activate=False)
    inputs = ZOO["bert"].inputs(2, 7)
    alone = []
    for rows in (["a", None], [None, "b"], ["a", "b"]):
        model.zero_grad()
        with vn.route(model, rows):
            loss(model, inputs).backward()
        alone.append(a.parts[0].P.grad.clone())
    torch.testing.assert_close(alone[0] + alone[1] - alone[2], torch.zeros(3, 32), atol=1e-5, rtol=0)
    assert all(g.abs().sum() > 0 for g in alone)
    held = [id(p) for group in vn.param_groups(model, 1e-3) for p in group["params"]]
    assert len(held) == len(set(held)) == 5
    with torch.no_grad():
        for i, adapter in enumerate((a, b)):
            shake(adapter.parameters(), i)
    target = vn.attach(model, vn.MultitaskPrompt(3, source="a, b"), name="t")
    p, q, r = (x.parts[0] for x in (target, a, b))
    assert torch.equal(p.P, q.P) and p.P is not q.P
    torch.testing.assert_close(p.u, (q.u + r.u) / 2)
    torch.testing.assert_close(p.v, (q.v + r.v) / 2)
    before = logits(model, inputs)
    vn.save(model, tmp_path / "t", name="t")
    fresh = ZOO["bert"].build()
    vn.load(fresh, tmp_path / "t")  # without its sources
    assert torch.equal(logits(fresh, inputs), before)
    vn.detach(model, "a")
    vn.activate(model, "b")
    assert torch.isfinite(logits(model, inputs)).all()


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (lambda: vn.MultitaskPrompt(3, shared="x"), "no adapter called 'x' is attached"),
        (lambda: vn.MultitaskPrompt(4, source="a"), "'a' has length 3 and rank 1"),
        (lambda: vn.MultitaskPrompt(3, source="l"), "'l' has no multitask prompt"),
        (lambda: vn.MultitaskPrompt(3, source=" "), "source is the name of an attached adapter"),
    ],
)
def test_a_source_that_is_none(plan: Any, text: str) -> None:
    model = ZOO["bert"].build()
    with refuses(vn.PlanError, "no adapter called 'a'"):
        vn.attach(model, vn.MultitaskPrompt(3, source="a"))
    vn.attach(model, vn.MultitaskPrompt(3), name="a")
    vn.attach(model, vn.LoRA(2), name="l")
    with pytest.raises((vn.PlanError, vn.AdapterError), match=text):
        vn.attach(model, plan(), name="b")
