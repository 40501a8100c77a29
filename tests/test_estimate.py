"""vn.estimate: what a step allocates and computes, told without a step."""

import operator

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

import veneer as vn
from test_optimize import MODELS, adapted
from veneer.simulate import transient

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def llama(**kw):
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config, attn_implementation="eager", use_cache=False, **kw))


def ledger_of_a_real_step(model, inputs):
    """(bytes that wait for the backward pass, flops) of a step with numbers."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with FlopCounterMode(display=False) as count, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**inputs).loss.backward()
    return sum(v for k, v in found.items() if k not in own), count.get_total_flops()


@pytest.mark.parametrize("plan", [vn.LoRA(4, at="linear"), vn.IA3(), vn.gated(vn.Bottleneck(8) + vn.LoRA(4))])
def test_what_is_kept_and_computed_is_what_a_real_step_keeps_and_computes(plan):
    model = llama()
    found = vn.estimate(model, plan, 4, 64, optimize=False)
    assert not hasattr(model, "_veneer_state")
    vn.attach(model, plan)
    ids = torch.zeros(4, 64, dtype=torch.long)
    kept, flops = ledger_of_a_real_step(model, {"input_ids": ids, "labels": ids})
    assert found.activations == pytest.approx(kept, rel=0.1) and found.flops == flops
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.weights >= sum(p.nbytes for p in model.parameters()) and found.optimizer == 8 * found.trainable
    assert found.peak >= found.weights + found.optimizer + found.activations
    assert vn.estimate(model, None, 4, 64, optimize=False) == found


def test_of_any_kind_of_model_and_nothing_of_it_is_allocated():
    for kind in ("bert", "t5"):
        model = MODELS[kind]()
        small, large = (vn.estimate(model, vn.LoRA(4), n, 128, optimize=False) for n in (8, 16))
        assert 1.8 < large.activations / small.activations < 2.2 and large.flops > 1.9 * small.flops
    with torch.device("meta"):
        big = tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=3)).bfloat16()
    found = vn.estimate(big, "lora", 2, 256, optimize=False)
    assert found.weights > 1.7e9 and found.seconds(1e12) == found.flops / 1e12
    assert str(found).startswith("peak 2.") and "trained" in str(found)


def test_with_inputs_of_its_own_and_without_a_loss():
    model = MODELS["bert"]().bert
    found = vn.estimate(model, vn.LoRA(4), optimize=False, inputs={"input_ids": torch.zeros(2, 9, dtype=torch.long)})
    assert found.flops > 0


def test_ways_to_optimise():
    torch._dynamo.reset()
    model = llama()
    plain = vn.estimate(model, vn.LoRA(4, at="linear"), 8, 64, optimize=False)
    fast = vn.estimate(model, vn.LoRA(4, at="linear"), 8, 64)
    small, low = (vn.estimate(model, vn.LoRA(4, at="linear"), 8, 64, optimize={"memory": "low", **o}) for o in ({"compile": False}, {}))
    fp8, away = (vn.estimate(model, vn.LoRA(4), 8, 64, optimize={"base_compute": "fp8", "offload_base": o, "compile": False}) for o in (False, True))
    assert small.activations < 0.2 * plain.activations and low.activations < 0.2 * fast.activations and low.peak < fast.peak
    assert fast.flops == plain.flops < min(low.flops, small.flops)
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n)
    assert fp8.weights - away.weights == 4 * linears  # fp32 here


def test_buffers_of_a_graph():
    """a = x y (100), b = relu(a), c = b y (100), d = c + a: b is written over nothing, for a is still read."""
    graph = torch.fx.Graph()
    size = torch.empty(25)  # fp32

    def node(target, *args):
        n = graph.call_function(target, args)
        n.meta["val"] = size
        return n

    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["val"] = y.meta["val"] = size
    a = node(torch.ops.aten.mm.default, x, y)
    b = node(torch.ops.aten.relu.default, a)
    c = node(torch.ops.aten.mm.default, b, y)
    d = node(torch.ops.aten.add.Tensor, c, a)
    graph.output((d,))
    assert transient(graph, [False, False]) == 300  # a, b, c
    assert transient(graph, [True, True]) == 200  # x goes once a is there, y once c is
    e = graph.inserting_before(d)
    with e:
        unused = graph.call_function(operator.getitem, (a, 0))
        unused.meta["val"] = size
    assert transient(graph, [False, False]) == 300


def test_errors():
    model = llama()
    for wrong in (0, 1.5, True):
        with pytest.raises(vn.ConfigError, match="no number of rows"):
            vn.estimate(model, "lora", wrong)
    with pytest.raises(vn.SiteError):
        vn.estimate(model, vn.LoRA(4, at="attn.z"))
    adapted(model, vn.LoRA(4))
    vn.optimize(model, compile=False)
    with pytest.raises(vn.AdapterError, match="optimised already"):
        vn.estimate(model)
    vn.unoptimize(model)

    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = llama()

        def forward(self, input_ids):
            return self.own(input_ids[:, : int(input_ids.max()) + 2]).logits

    with pytest.raises(vn.ConfigError, match="needs numbers"):
        vn.estimate(Asks(), vn.LoRA(2), optimize=False)
