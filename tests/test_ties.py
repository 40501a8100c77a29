"""Tied tables: what acts on the embedding acts on the head that holds the same tensor, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer as vn
from helpers import look, refuses, shake
from test_peft_format import logits, quietly, shaken
from zoo import VOCAB, ZOO


def tied(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        model: nn.Module = transformers.LlamaForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=True, dropout_rate=0.0)
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "bert":
        config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        model = transformers.BertForMaskedLM(config)
    else:
        model = ZOO["gpt2"].build()
    inputs = ZOO[{"t5": "t5", "bert": "bert"}.get(kind, "llama")].inputs(2, 7)
    return model.eval(), inputs


def table(model: Any) -> nn.Parameter:
    e, h = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert model.get_output_embeddings()._parameters["weight"] is model.get_input_embeddings()._parameters["weight"]
    assert isinstance(e, Tensor) and isinstance(h, Tensor)
    return model.get_input_embeddings()._parameters["weight"]


def change(adapter: vn.Adapter, model: Any) -> Tensor:
    """What the adapter adds to the stored table."""
    (part,) = [p for p in adapter.parts if p.echoes]
    p = table(model).detach()
    if hasattr(part, "map"):
        return part.map.stored(part.fold(part.map.canonical(p), None)[0], p).detach()
    return (part.value(p) - p).detach()


PLANS = {
    "embed": lambda: vn.LoRA(2, at="embed"),
    "head": lambda: vn.LoRA(2, at="head"),
    "full": lambda: vn.Full(at="embed"),
    "full-head": lambda: vn.Full(at="head"),
    "delta": lambda: vn.LoHa(4, at="head"),
    "input": lambda: vn.OFT(4, at="head"),
    "input-gain": lambda: vn.BOFT(4, at="head"),
    "scale": lambda: vn.IA3(at="embed"),
    "scale-in": lambda: vn.IA3(at="head", on="input"),
    "scale-rows": lambda: vn.IA3(at="head"),
    "bias": lambda: vn.BEFT(at="head"),
}


CASES = [(kind, plan) for kind in ("llama", "t5") for plan in PLANS] + [(kind, plan) for kind in ("gpt2", "bert") for plan in ("embed", "full-head", "input")]


@pytest.mark.parametrize(("kind", "plan"), CASES)
def test_it_acts_at_both_and_stays_tied(kind: str, plan: str, tmp_path: Any) -> None:
    model, inputs = tied(kind)
    before = look(model, inputs)
    adapter = vn.attach(model, PLANS[plan](), name="a")
    torch.testing.assert_close(look(model, inputs), before, atol=1e-5, rtol=1e-4)
    shake(adapter)
    after = look(model, inputs)
    moved = float((after - before).abs().max())
    assert moved > 1e-3
    table(model)

    # what a base with that table gives
    if plan != "bias" and kind != "bert":  # its head has a bias too, that vn.Full takes along
        other, _ = tied(kind)
        with torch.no_grad():
            table(other).add_(change(adapter, model))
        torch.testing.assert_close(look(other, inputs), after, atol=1e-3 * moved + 1e-5, rtol=1e-4)

    vn.save(model, tmp_path, name="a")
    fresh, _ = tied(kind)
    vn.load(fresh, tmp_path)
    assert torch.equal(look(fresh, inputs), after)
    table(fresh)

    held = table(model).detach().clone()
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-3 * moved + 1e-5, rtol=1e-4)
    assert torch.equal(table(model), held) == (plan == "bias")
    vn.unmerge(model)
    assert torch.equal(table(model), held)
    vn.detach(model)
    assert torch.equal(look(model, inputs), before)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("at", ["embed", "head"])
def test_the_gradient_comes_from_both_uses(kind: str, at: str) -> None:
    """LoRA's gradient is that of the table, pulled back to its factors: both uses are in it."""
    model, inputs = tied(kind)
    adapter = shake(vn.attach(model, vn.LoRA(2, at=at)))
    labels = {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}
    model(**labels).loss.backward()
    (part,) = [p for p in adapter.parts if p.echoes]
    other, _ = tied(kind)
    with torch.no_grad():
        table(other).add_(change(adapter, model))
    other(**labels).loss.backward()
    g = part.map.canonical(table(other).grad)
    torch.testing.assert_close(part.A.grad, part.scale * part.B.detach().t() @ g, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(part.B.grad, part.scale * g @ part.A.detach().t(), atol=1e-6, rtol=1e-3)


def test_one_change_of_a_tied_table_for_one_method() -> None:
    model, _ = tied("llama")
    adapter = vn.attach(model, vn.LoRA(2, at="embed,head"))
    assert [p.site.path for p in adapter.parts] == ["model.embed_tokens"]
    assert len(vn.attach(ZOO["llama"].build(), vn.LoRA(2, at="embed,head")).parts) == 2
    assert len([p for p in vn.attach(tied("gpt2")[0], vn.Full(at="embed,head")).parts if p.echoes]) == 1


@pytest.mark.parametrize("plan", [vn.LoRA(2, at="embed", tied=False), vn.LoRA(2, at="embed,head", tied=False), vn.Full(at="head", tied=False)], ids=str)
def test_at_the_named_site_alone_where_asked(plan: Any) -> None:
    model, inputs = tied("llama")
    adapter = shake(vn.attach(model, plan))
    assert not any(p.echoes for p in adapter.parts)
    with refuses(vn.MergeError, "tied to", "tie_word_embeddings=False", model=model):
        vn.merge(model)


@pytest.mark.parametrize("saved", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
def test_a_file_of_pefts_acts_where_peft_does(saved: dict[str, Any], tmp_path: Any) -> None:
    import peft

    model, inputs = tied("llama")
    theirs = shaken(model, peft.LoraConfig(r=2, **saved))
    expected = logits(theirs, inputs)
    quietly(theirs.save_pretrained, tmp_path)
    here, _ = tied("llama")
    adapter = vn.load(here, tmp_path, name="a")
    torch.testing.assert_close(look(here, inputs), expected, atol=1e-5, rtol=1e-4)
    assert any(m.tied is False for m in adapter.plan.leaves())
    vn.save(here, tmp_path / "native", name="a")
    again, _ = tied("llama")
    vn.load(again, tmp_path / "native")
    assert torch.equal(look(again, inputs), look(here, inputs))
    both, _ = tied("llama")
    vn.attach(both, vn.LoRA(2, at="embed"), name="a")
    with refuses(vn.CapabilityError, "acts at both here", "tied=False", model=both):
        vn.save(both, tmp_path / "peft", name="a", format="peft")


def test_two_adapters_add_and_rows_are_routed() -> None:
    model, inputs = tied("llama")
    shake(vn.attach(model, vn.LoRA(2, at="embed"), name="a"), 1)
    shake(vn.attach(model, vn.OFT(4, at="head"), name="b"), 2)
    shake(vn.attach(model, vn.Full(at="head"), name="c"), 3, 0.05)
    alone = []
    for name in ("a", "b", "c"):
        vn.activate(model, name)
        alone.append(look(model, inputs))
    for one, two in ((0, 1), (1, 2), (2, 0)):
        with vn.route(model, ["abc"[one], "abc"[two]]):
            mixed = look(model, inputs)
        torch.testing.assert_close(mixed[0], alone[one][0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1], alone[two][1], atol=2e-5, rtol=1e-4)
    vn.activate(model, ["a", "b"])
    both = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), both, atol=1e-4, rtol=1e-3)
    vn.detach(model)
    assert not any(getattr(type(m), "_veneer_generated", False) for m in model.modules())


def test_both_sides_of_one_tensor_are_not_merged_where_order_matters() -> None:
    model, inputs = tied("llama")
    shake(vn.attach(model, vn.OFT(4, at="head"), name="a"), 1)
    shake(vn.attach(model, vn.IA3(at="embed"), name="b"), 2)
    vn.activate(model, ["a", "b"])
    look(model, inputs)
    with refuses(vn.MergeError, "oft at lm_head and ia3 here|ia3 at model.embed_tokens and oft here", "from both sides", model=model):
        vn.merge(model)
    one, _ = tied("llama")  # at one module alike: the embedding's rows are scaled as they are, and the head's rotated ones
    vn.attach(one, vn.OFT(4, at="head") + vn.IA3(at="head"), name="a")
    with refuses(vn.MergeError, "oft at lm_head and ia3 here", "from both sides", model=one):
        vn.merge(one)


@pytest.mark.parametrize("plan", ["embed", "input"])
def test_generation_with_a_gate_goes_on_from_the_cache(plan: str) -> None:
    """A running gate keeps sums of its own at each place, so tokens decoded one by one see what a whole sequence sees."""
    model, inputs = tied("llama")
    shake(vn.attach(model, vn.gated(PLANS[plan]())), 1, 0.5)
    ids = inputs["input_ids"][:, :4]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    fast, slow = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(fast.scores), torch.stack(slow.scores), atol=1e-5, rtol=1e-4)


def test_generate_is_the_merged_models() -> None:
    model, inputs = tied("gpt2")
    shake(vn.attach(model, vn.LoRA(2, at="embed")), 2, 0.5)
    ids = inputs["input_ids"][:, :4]
    said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    vn.merge(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), said)


def test_no_table_sized_product_for_low_rank_parts() -> None:
    """No tensor of V x d is made by a step: the embedding's rows are looked up, the head's product has rank r."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, inputs = tied("llama")
    vn.attach(model, vn.LoRA(2, at="embed") + vn.OFT(4, at="name:lm_head"))
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and sorted(out.shape) == [32, VOCAB] and out._base is None and func.__name__ != "t.default":
                sizes.append(func)
            return out

    loss = model(**inputs, labels=inputs["input_ids"]).loss
    with Watch():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    made = [f for f in sizes if f not in (torch.ops.aten.t.default, torch.ops.aten.detach.default, torch.ops.aten.transpose.int)]
    assert not made, made
