"""Packed rows give the losses and gradients of the same rows one by one; what would mix them is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import veneer as vn
from helpers import grads, shake
from veneer.data.packing import PackedCollator, check_packing, pack

SIZE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, intermediate_size=24, num_key_value_heads=1)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "mistral, sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZE, intermediate_size=24, num_key_value_heads=1, sliding_window=4)),
}


def rows(count=7):
    g = torch.Generator().manual_seed(1)
    out = []
    for i in range(count):
        ids = torch.randint(1, 50, (3 + 2 * i,), generator=g).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (i % 3) + ids[i % 3 :]})
    return out


def loss(model, **batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plan", [vn.LoRA(4, at="linear"), vn.Bottleneck(4) + vn.Prefix(3), vn.gated(vn.LoRA(2), per="token")], ids=str)
def test_packed_rows_are_as_if_alone(kind, plan):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    adapter = shake(vn.attach(model, plan, name="a"))
    check_packing(model, plan)
    packed = pack(rows(), 24)
    assert len(packed) < 7 and sum(len(r["input_ids"]) for r in packed) == sum(len(r["input_ids"]) for r in rows())
    together = loss(model, **PackedCollator(0)(packed))
    together.backward()
    of_packed = grads(adapter)
    for p in adapter.parameters():
        p.grad = None
    alone = sum(loss(model, **{k: torch.tensor([v]) for k, v in r.items()}) for r in rows())
    alone.backward()
    assert torch.allclose(together, alone, rtol=1e-5)
    for name, g in grads(adapter).items():
        assert torch.allclose(of_packed[name], g, rtol=1e-3, atol=1e-4), name


def test_no_row_is_lost_or_cut_and_none_is_too_long():
    packed = pack(rows(), 20)
    assert max(len(r["input_ids"]) for r in packed) <= 20
    found = sorted(tuple(ids) for r in packed for ids in _split(r))
    assert found == sorted(tuple(r["input_ids"]) for r in rows())
    assert all(r["labels"][i] == -100 for r in packed for i, p in enumerate(r["position_ids"]) if p == 0)


def _split(row):
    starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
    return [row["input_ids"][a:b] for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize(
    ("build", "plan", "says"),
    [
        (MODELS["llama"], vn.PromptTuning(2), "prompt stands before the first sequence"),
        (MODELS["llama"], vn.gated(vn.LoRA(2)), "a gate for each example would mix"),
        (lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)), vn.LoRA(1, at="linear"), "mix"),
    ],
)
def test_what_would_mix_sequences_is_refused(build, plan, says):
    model = build()
    vn.attach(model, plan, name="a")
    with pytest.raises(vn.ConfigError, match=f"{says}.*packing=false"):
        check_packing(model, plan)
