"""vn.optimize(memory=...): the same step, with less kept for the backward pass."""

import pytest
import torch

import veneer as vn
from test_optimize import MODELS, adapted, batch, llama, same, step

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def kept(model, inputs):
    """Bytes that the forward pass leaves for the backward pass."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**inputs)
    return sum(v for k, v in found.items() if k not in own)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_run_again(kind):
    plan = vn.LoRA(4, at="linear") if kind == "t5" else vn.LoRA(4, at="linear", dropout=0.2) + vn.Prefix(3)
    model, inputs = adapted(MODELS[kind]().train(), plan), batch(kind)

    def seeded():
        torch.manual_seed(5)
        return step(model, inputs)

    plain, before = seeded(), kept(model, inputs)
    vn.optimize(model, compile=False, fuse=False, memory="low")
    same(plain, seeded())
    vn.unoptimize(model)
    assert kept(model, inputs) == before
    same(plain, seeded(), 1e-7)


def test_a_cache_is_not_filled_twice():
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    del inputs["use_cache"]
    plain = step(model, inputs)
    vn.optimize(model, compile=False, memory="low")
    same(plain, step(model, inputs))
    out = model.eval()(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=True)
    assert out.past_key_values.get_seq_length() == 7


def test_the_models_own_checkpointing_comes_first():
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    plain = step(model, inputs)
    vn.optimize(model, compile=False, memory="low")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda *a: calls.append(1))
    same(plain, step(model, inputs))
    assert len(calls) == 2


@pytest.mark.parametrize("memory", ["low", 0.3])
def test_compiled_layers_keep_their_inputs_alone(memory):
    torch._dynamo.reset()
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    plain = step(model, inputs)
    options = {"compile": {"backend": "aot_eager_decomp_partition", "fullgraph": True}}
    vn.optimize(model, **options)
    same(plain, step(model, inputs))
    all_of_it = kept(model, inputs)
    vn.unoptimize(model)
    torch._dynamo.reset()
    vn.optimize(model, **options, memory=memory)
    same(plain, step(model, inputs))
    assert kept(model, inputs) < (0.5 if memory == "low" else 0.8) * all_of_it


def test_errors():
    model = adapted(llama(), vn.LoRA(4))
    for wrong in ("lo", 1.5, True):
        with pytest.raises(vn.ConfigError, match="neither 'low' nor a number"):
            vn.optimize(model, memory=wrong)
    with pytest.raises(vn.ConfigError, match="compile is off"):
        vn.optimize(model, memory=0.5, compile=False)
    step(model, batch("llama"))
    vn.optimize(model)
