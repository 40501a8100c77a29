"""Quantised bases, by the libraries themselves: attach, train, save, load, merge into either form."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import veneer as vn
from helpers import grads, refuses, shake, unchanged
from veneer.methods.parts import MapPart

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantisers', about kernels that a CPU has not


def torchao(name: str):
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)())


QUANTISERS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": lambda: torchao("Float8WeightOnlyConfig"),
}
if importlib.util.find_spec("torchao") is None:  # not a part of the test extra: it cannot be imported where warnings are errors
    QUANTISERS = {kind: make for kind, make in QUANTISERS.items() if not kind.startswith("torchao")}
IDS = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(base, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=QUANTISERS[kind]()).eval()


def look(model):
    with torch.no_grad():
        return model(IDS).logits


PLAN = vn.gated(vn.LoRA(4, at="linear") + vn.Prefix(3) + vn.Bottleneck(4, activation="gelu")) + vn.IA3()


@pytest.mark.parametrize("kind", QUANTISERS)
def test_attach_train_save_load(base, kind, tmp_path):
    before = look(load(base, kind))
    # trained before it is first evaluated: bitsandbytes packs 4-bit weights anew for CPUs then, and sends no gradient on
    model = load(base, kind)
    adapter = vn.attach(model, PLAN, name="a")
    model.train()
    optimiser = vn.adamw(model, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert set(grads(adapter)) == {n for n, _ in adapter.named_parameters()}
        assert all(p.grad is None for n, p in model.named_parameters() if "_veneer" not in n)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    after = look(model)
    assert not torch.allclose(after, before, atol=1e-3)
    with vn.disabled(model):
        assert torch.equal(look(model), before)
    vn.save(model, tmp_path / "a")
    other = load(base, kind)
    vn.load(other, tmp_path / "a", name="b")
    assert torch.equal(look(other), after)
    vn.detach(model)
    assert torch.equal(look(model), before)


@pytest.mark.parametrize("kind", QUANTISERS)
def test_the_matrix_of_a_packed_module_is_known(base, kind):
    plain = LlamaForCausalLM.from_pretrained(base)
    model = load(base, kind)
    for part in vn.attach(model, vn.LoRA(2, at="linear")).parts:
        assert isinstance(part, MapPart)
        w, own = part.weight().float(), plain.get_submodule(part.site.path).weight
        assert float((w - own).norm() / own.norm()) < (0.15 if kind == "nf4" else 0.04)
        x = torch.randn(5, part.site.inp)
        module = model.get_submodule(part.site.path)
        with vn.disabled(model), torch.no_grad():
            y = module(x)
            assert float((y - x @ w.T).norm() / y.norm()) < 0.02


@pytest.mark.parametrize("into", ["dequantised", "requantised"])
@pytest.mark.parametrize("kind", QUANTISERS)
def test_merge_and_its_error(base, kind, into):
    model = load(base, kind)
    before = look(model)
    with unchanged(model):
        shake(vn.attach(model, vn.LoRA(4, at="linear"), name="a"), scale=0.05)
        adapted = look(model)
        merged = vn.merge(model, into=into)
        change, error = float((adapted - before).norm()), float((look(model) - adapted).norm())
        kinds = {type(model.get_submodule(p.site.path)) for p in vn.Adapter(model, "a").parts}
        if into == "dequantised":
            assert kinds == {torch.nn.Linear} and merged.error < 1e-5
            assert error < 0.05 * change
        else:
            assert all("Linear" in k.__name__ for k in kinds)
            assert 0.001 < merged.error < 1
            assert error < change
        with vn.disabled(model):
            assert torch.equal(look(model), before)
        vn.unmerge(model)
        assert torch.equal(look(model), adapted)
        vn.detach(model)
    assert torch.equal(look(model), before)


def test_a_quantised_merge_must_say_into_what(base):
    model = load(base, "nf4")
    look(model)
    vn.attach(model, vn.LoRA(2), name="a")
    with unchanged(model):
        with refuses(vn.MergeError, "quantised", "into='dequantised'"):
            vn.merge(model)
        with refuses(vn.MergeError, "into='dequantized'", "dequantised"):
            vn.merge(model, into="dequantized")
        model.hf_quantizer, kept = None, model.hf_quantizer
        with refuses(vn.MergeError, "no quantiser", "dequantised"):
            vn.merge(model, into="requantised")
        model.hf_quantizer = kept
