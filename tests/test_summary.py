"""The table: the paper's numbers, from shapes alone."""

from __future__ import annotations

import pytest
import torch

import veneer as vn
from helpers import build, fresh, look, refuses, shake


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    """BERT-base without memory for it."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return BertModel(BertConfig(), add_pooling_layer=False)


@pytest.mark.parametrize(
    ("plan", "count", "share"),
    [
        (vn.Prefix(10), 184_320, 0.17),
        (vn.LoRA(8), 294_912, 0.27),
        (vn.Bottleneck(48), 894_528, 0.82),
        (vn.Bottleneck(48) + vn.Prefix(10), 1_078_848, 0.99),
        (vn.Bottleneck(48) + vn.Prefix(10) + vn.LoRA(8), 1_373_760, 1.26),
        (vn.BitFit(), 102_144, 0.09),
        (vn.PromptTuning(20), 15_360, 0.01),
        (vn.IA3(), 12 * (768 + 768 + 3072), 0.05),
    ],
    ids=str,
)
def test_bert_base(base: torch.nn.Module, plan: vn.Plan, count: int, share: float) -> None:
    vn.attach(base, plan, name="a")
    try:
        s = vn.summary(base)
        assert s.trainable == count == sum(r["parameters"] for r in s.rows)
        assert s.total == 108_891_648 and round(100 * s.share, 2) == pytest.approx(share, abs=0.011)
        assert f"trainable {count:,} of 108,891,648" in str(s)
        if plan != vn.PromptTuning(20) and plan != vn.BitFit():
            vn.attach(base, vn.gated(plan), name="g")
            gates = {r["role"]: r["parameters"] for r in vn.summary(base).rows if r["adapter"] == "g" and r["method"].endswith("gate")}
            assert all(n in (12 * 769, 12 * 3073) for n in gates.values()) and gates
    finally:
        vn.detach(base)


def test_rows_and_text() -> None:
    model = build()
    vn.attach(model, vn.LoRA(2) + vn.Full(at="head"), name="a")
    vn.attach(model, vn.gated(vn.Bottleneck(3)), name="b")
    s = vn.summary(model)
    assert [(r["adapter"], r["method"], r["role"], r["sites"]) for r in s.rows] == [
        ("a", "lora", "attn.q", 3), ("a", "lora", "attn.v", 3), ("a", "full", "head", 2), ("b", "bottleneck", "ffn", 3), ("b", "bottleneck gate", "ffn", 3),
    ]  # fmt: skip
    assert s.active == ("b",) and s.trainable == 3 * (2 * 3 * 32 + 3 + 32) + 3 * 33
    assert s.total == sum(p.numel() for p in build().parameters())
    lines = str(s).splitlines()
    assert lines[0].split() == ["adapter", "method", "role", "sites", "parameters", "share", "of", "base"]
    assert len(lines) == 8 and lines[2].startswith("a (off)  lora") and lines[5].startswith("b  ") and lines[-1].endswith("active: b")
    assert len({len(line) for line in lines[:-1]}) == 1, "the columns line up"
    vn.activate(model, None)
    assert vn.summary(model).trainable == 0 and "active: none" in str(vn.summary(model))


def test_merged_and_shared() -> None:
    model, inputs = fresh()
    shake(vn.attach(model, vn.LoRA(2), name="a"))
    total = vn.summary(model).total
    look(model, inputs)
    vn.merge(model)
    s = vn.summary(model)
    assert s.total == total and "a (merged)" in str(s) and s.trainable == 0
    vn.detach(model)
    with refuses(vn.AdapterError, "nothing is attached", model=model):
        vn.summary(model)
