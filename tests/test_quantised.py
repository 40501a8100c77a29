"""Quantised bases, by the libraries themselves: attach, train, save, load, merge into either form."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer as vn
from helpers import grads, refuses, shake, unchanged
from veneer.methods.parts import MapPart
from veneer.train.quantize import QUANTISERS, quantization

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantisers', about kernels that a CPU has not


IDS = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(vocab_size=99, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(base, kind, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(base, **{"dtype": dtype} | quantization(kind, "cpu")).eval()


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
def test_the_share_is_of_the_numbers_and_not_of_the_bytes(base, kind):
    plain, packed = AutoModelForCausalLM.from_pretrained(base), load(base, kind)
    for model in (plain, packed):
        vn.attach(model, vn.LoRA(2), name="a")
    assert vn.summary(packed).total == vn.summary(plain).total and vn.summary(packed).share == vn.summary(plain).share


@pytest.mark.parametrize("kind", QUANTISERS)
def test_the_matrix_of_a_packed_module_is_known(base, kind):
    plain = LlamaForCausalLM.from_pretrained(base)
    model = load(base, kind)
    for part in vn.attach(model, vn.LoRA(2, at="linear")).parts:
        assert isinstance(part, MapPart)
        w, own = part.weight().float(), plain.get_submodule(part.site.path).weight
        assert 0.001 < float((w - own).norm() / own.norm()) < (0.15 if "4" in kind else 0.04)
        x = torch.randn(5, part.site.inp, dtype=model.dtype)
        module = model.get_submodule(part.site.path)
        with vn.disabled(model), torch.no_grad():
            y = module(x)
            assert float((y - x.float() @ w.T).norm() / y.norm()) < 0.02


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
            assert kinds == {torch.nn.Linear} and merged.error < (1e-5 if model.dtype == torch.float32 else 0.01)
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


@pytest.mark.parametrize("kind", QUANTISERS)
def test_merge_into_a_half_precision_base(base, kind):
    model = load(base, kind, torch.bfloat16)
    before = look(model)
    shake(vn.attach(model, vn.LoRA(4, at="linear"), name="a"), scale=0.05)
    adapted = look(model)
    for into in ("dequantised", "requantised"):
        vn.merge(model, into=into)
        assert float((look(model) - adapted).norm()) < 0.5 * float((adapted - before).norm())
        vn.unmerge(model)
        assert torch.equal(look(model), adapted)


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


class Packed(torch.nn.Linear):
    """Eight bits and a scale a row, by a kernel without a derivative: torchao's four bits have none, nor bitsandbytes' once a
    CPU has packed them for inference."""

    def __init__(self, own):
        super().__init__(own.in_features, own.out_features, bias=False, device="meta")
        self.register_buffer("scale", own.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = torch.nn.Parameter((own.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_gradients_pass_through_kernels_that_have_none(base):
    packed, plain = (LlamaForCausalLM.from_pretrained(base).eval() for _ in range(2))
    for path, module in list(packed.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            new = Packed(module)
            packed.set_submodule(path, new)
            plain.get_submodule(path).weight.data = new.weight * new.scale
    with unchanged(packed):
        found = []
        for model in (packed, plain):
            torch.manual_seed(0)
            adapter = shake(vn.attach(model, vn.LoRA(4, at="attn.q") + vn.Bottleneck(3, activation="gelu"), name="a"), scale=0.05)
            model(IDS, labels=IDS).loss.backward()
            found.append(grads(adapter))
            model.zero_grad()
        assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * (2 + 4)
        for key, g in found[1].items():
            assert float((found[0][key] - g).norm()) < 1e-4 * float(g.norm()), key
        vn.detach(packed)


@pytest.mark.parametrize("width", [5, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_derivative_that_a_packed_map_has_not(width, dtype, biased, monkeypatch):
    """dx = W^T dy, W asked for a few columns at a time, whatever the shape of x; the bias takes no part."""
    from veneer.ops import weights

    monkeypatch.setattr(weights, "ROWS", 8)
    torch.manual_seed(0)
    module = Packed(torch.nn.Linear(width, 6)).to(dtype)
    if biased:
        module.register_parameter("bias", torch.nn.Parameter(torch.randn(6, dtype=dtype), requires_grad=False))
    w = module.weight * module.scale
    assert not weights.derivable(module, width, module.weight) and weights.derivable(torch.nn.Linear(width, 6), width, None)
    for shape in [(width,), (3, width), (2, 3, width), (0, width)]:
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = weights.Passed.apply(x, module)
        assert torch.equal(y, module(x)) and y.dtype == dtype
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.shape == x.shape and dx.dtype == dtype
        torch.testing.assert_close(dx, dy @ w, **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}))


def test_it_is_recomputed_compiled_and_cast_as_any_other(base):
    """Gradient checkpointing, torch.compile and autocast: the gradients of a base that holds the same numbers unpacked."""
    from torch.utils.checkpoint import checkpoint

    packed, plain = (LlamaForCausalLM.from_pretrained(base).eval() for _ in range(2))
    new = Packed(packed.model.layers[1].mlp.up_proj)
    packed.model.layers[1].mlp.up_proj, plain.model.layers[1].mlp.up_proj.weight.data = new, new.weight * new.scale
    x = torch.randn(2, 5, 128)

    def again(f):
        return lambda x: checkpoint(f, x, use_reentrant=False)

    def cast(f):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return f(x)

        return run

    for way, atol in ((again, 1e-6), (lambda f: torch.compile(f, backend="aot_eager", fullgraph=True), 1e-6), (cast, 1e-2)):
        found = []
        for model in (packed, plain):
            torch.manual_seed(0)
            adapter = shake(vn.attach(model, vn.LoRA(2, at="ffn.gate@0:"), name="a"), scale=0.05)
            loss = way(model.model.layers[1].mlp)(x.requires_grad_()).float().square().mean()
            loss.backward()
            found.append([x.grad, *grads(adapter).values()])
            x.grad = None
            vn.detach(model)
            torch._dynamo.reset()
        for a, b in zip(*found, strict=True):
            assert float((a - b).norm()) <= atol * float(b.norm()), way
