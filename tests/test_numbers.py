"""Numbers of the papers, from shapes alone: parameter counts on the meta device, and what an import loads."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

import veneer as vn


def bert_base() -> Any:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return BertModel(BertConfig())


@cache
def xxl() -> Any:
    """T5-v1.1-XXL's shape."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


BERT = 109_482_240  # bert-base without a head
PREFIX, LORA, BOTTLENECK = 184_320, 294_912, 894_528
GATE = 768 + 1  # w and b


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        (lambda: vn.Prefix(10), PREFIX),
        (lambda: vn.LoRA(8), LORA),
        (lambda: vn.Bottleneck(48), BOTTLENECK),
        # one gate a layer for the bottleneck and one for the prefix; two for LoRA, on q and on v
        (lambda: vn.preset("unipelt-ap"), BOTTLENECK + PREFIX + 12 * 2 * GATE),
        (lambda: vn.preset("unipelt-apl"), BOTTLENECK + PREFIX + LORA + 12 * 4 * GATE),
        (lambda: vn.BitFit(), 102_912),
    ],
)
def test_unipelts_counts(plan: Any, count: int) -> None:
    model = bert_base()
    vn.attach(model, plan())
    s = vn.summary(model)
    assert (s.trainable, s.total) == (count, BERT)
    assert sum(r["parameters"] for r in s.rows) == count
    gates = sum(r["parameters"] for r in s.rows if r["method"].endswith("gate"))
    assert gates == {BOTTLENECK + PREFIX + 12 * 2 * GATE: 18_456, BOTTLENECK + PREFIX + LORA + 12 * 4 * GATE: 36_912}.get(count, 0)


def test_unipelts_shares() -> None:
    """The paper's percentages of BERT-base, without gates; it prints 0.81 for the bottleneck and 1.26 for all three."""
    for plan, percent in ((vn.Prefix(10), 0.17), (vn.LoRA(8), 0.27), (vn.Bottleneck(48), 0.82)):
        model = bert_base()
        vn.attach(model, plan)
        assert round(100 * vn.summary(model).share, 2) == percent
    assert round(100 * (PREFIX + BOTTLENECK) / BERT, 2) == 0.99
    assert round(100 * (PREFIX + BOTTLENECK + LORA) / BERT, 2) == 1.25


def test_tfews_share() -> None:
    """(IA)3 trains about 0.01% of an 11B model, three vectors a block; LoRA several times that."""
    model = xxl()
    vn.attach(model, vn.IA3(), name="ia3")
    s = vn.summary(model)
    assert s.trainable == 24 * (2 * 4096 + 10240) + 24 * (4 * 4096 + 10240) == 1_081_344
    assert 11.0e9 < s.total < 11.2e9 and 0.00009 < s.share < 0.00011
    vn.detach(model)
    vn.attach(model, vn.LoRA(8), name="lora")
    s = vn.summary(model)
    assert s.trainable == 48 * 2 * 8 * (4096 + 4096) and s.share > 0.0003
    vn.detach(model)


def test_attach_to_eight_billion() -> None:
    """On the meta device nothing of the base's size is made; benchmarks/overhead.py has the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = vn.attach(model, vn.LoRA(8, at="linear"))
    attention, ffn = (4096 + 4096) * 2 + (4096 + 1024) * 2, (4096 + 14336) * 3
    assert len(adapter.parts) == 7 * 32 and adapter.num_parameters == 32 * 8 * (attention + ffn) == 20_971_520
    assert all(p.is_meta for p in adapter.parameters())
    assert vn.summary(model).total == 8_030_261_248


def test_import_is_light() -> None:
    code = "import sys, veneer; veneer.__all__; dir(veneer); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
