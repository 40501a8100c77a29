"""vn.optimize(base_compute="fp8"): the products against their plain form, and everything about them undone."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers as tf

import veneer as vn
from test_optimize import adapted, batch, same, step
from veneer.ops import fp8

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
PLANS = {
    "lora": lambda: vn.LoRA(4, at="linear"),
    "dora": lambda: vn.DoRA(4),
    "ia3": vn.IA3,
    "gated": lambda: vn.gated(vn.Bottleneck(8) + vn.Prefix(3) + vn.LoRA(4)),
}


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)
    )


def gpt2():
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def products(model):
    return [n for n, m in model.named_modules() if "_veneer_product" in m.__dict__]


def error(a, b):
    return (a.float() - b.float()).norm() / b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_its_plain_form_and_near_to_the_exact_one(dtype):
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 5, 64).to(dtype).requires_grad_(), torch.randn(48, 64).to(dtype) * 0.1, torch.randn(48).to(dtype)
    y = fp8.linear(x, fp8.quantised(w), b)
    assert y.dtype == dtype and error(y, fp8.reference(x, w, b)) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert 0.01 < error(y, F.linear(x.float(), w.float(), b.float())) < 0.05
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert dx.dtype == dtype and error(dx, fp8.reference(g, w.t(), None)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_every_token_has_the_whole_range():
    """Tokens of very different sizes, rows of zeros, and numbers beyond e4m3's own range."""
    w = torch.randn(16, 32)
    x = torch.randn(4, 32) * torch.tensor([1e-6, 1.0, 1e6, 0.0])[:, None]
    y, exact = fp8.linear(x, fp8.quantised(w), None), F.linear(x, w)
    assert all(error(a, b) < 0.06 for a, b in zip(y[:3], exact[:3], strict=True)) and (y[3] == 0).all()
    x[1, 0] = float("nan")
    y = fp8.linear(x, fp8.quantised(w), None)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("plan", PLANS)
def test_any_plan_stands_on_it_and_comes_off_again(make, plan):
    model, inputs = adapted(make(), PLANS[plan]()), batch("llama")
    classes = {n: type(m) for n, m in model.named_modules()}
    plain = step(model, inputs)
    vn.optimize(model, compile=False, base_compute="fp8")
    assert len(products(model)) == (14 if make is llama else 8) and not any("head" in n for n in products(model))
    ours = step(model, inputs)
    assert ours[1].keys() == plain[1].keys() and 1e-6 < error(ours[0], plain[0]) < 0.01
    total, exact = (torch.cat([s[1][n].flatten() for n in plain[1]]) for s in (ours, plain))
    assert error(total, exact) < 0.15
    vn.unoptimize(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes and not products(model)
    same(plain, step(model, inputs), 1e-7)
    vn.optimize(model, compile=False, base_compute="fp8")
    vn.detach(model)
    assert all(not k.startswith("_veneer") for m in model.modules() for k in m.__dict__) and "_veneer" not in type(model).__name__


def test_compiled_it_is_one_graph_shared_by_like_layers_and_quantises_each_input_once():
    torch._dynamo.reset()
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    vn.optimize(model, compile=False, base_compute="fp8")
    plain = step(model, inputs)
    vn.unoptimize(model)
    graphs = []

    def see(graph, _):
        graphs.append(sum(n.target is torch.ops.aten._to_copy.default and n.kwargs.get("dtype") == fp8.DTYPE for n in graph.graph.nodes))
        return make_boxed_func(graph)

    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=see, partition_fn=min_cut_rematerialization_partition)
    vn.optimize(model, compile={"backend": backend, "fullgraph": True}, base_compute="fp8")
    same(plain, step(model, inputs), 1e-5)
    # of the seven maps q, k and v share an input, and gate and up; then the gradients of the seven outputs, or of four
    # where the layer's own input needs no gradient
    assert sorted(graphs) == [4, 4, 4, 7]


def test_what_changes_afterwards_is_followed():
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    model = adapted(llama().eval(), vn.LoRA(4, at="attn.q"))
    vn.optimize(model, compile=False, base_compute="fp8")
    q = model.model.layers[0].self_attn.q_proj
    first = q.__dict__["_veneer_product"]
    with torch.no_grad():
        y = model(**inputs).logits
        vn.merge(model)
        assert q.__dict__["_veneer_product"] is not first and error(model(**inputs).logits, y) < 0.05
        vn.unmerge(model)
        torch.testing.assert_close(model(**inputs).logits, y)
    vn.attach(model, vn.Full(at="attn.k"), name="full")
    assert all("k_proj" not in n for n in products(model)) and len(products(model)) == 12
    with torch.no_grad():
        assert error(model(**inputs).logits, llama().eval()(**inputs).logits) < 0.05


def test_the_head_a_router_and_odd_sizes_keep_their_own_product():
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(
        tf.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, num_local_experts=16, vocab_size=64
        )
    )
    vn.attach(model, vn.LoRA(2))
    vn.optimize(model, compile=False, base_compute="fp8")
    assert [n.split(".")[-1] for n in products(model)] == ["q_proj", "o_proj"]


def test_errors():
    model = adapted(llama(), vn.LoRA(4))
    with pytest.raises(vn.ConfigError, match="base_compute='fp9' is no arithmetic.*Did you mean 'fp8'"):
        vn.optimize(model, base_compute="fp9")
    with pytest.raises(vn.ConfigError, match="Give base_compute='fp8' too"):
        vn.optimize(model, offload_base=True)
    odd = adapted(
        tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)), vn.LoRA(2)
    )
    with pytest.raises(vn.CapabilityError, match="no layer has a frozen linear map"):
        vn.optimize(odd, base_compute="fp8")
    step(model, batch("llama"))
    vn.optimize(model)  # nothing was left behind


def test_a_device_without_fp8_is_refused(monkeypatch):
    from veneer.frozen import capable

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA A100")
    with pytest.raises(vn.CapabilityError, match="NVIDIA A100 has no fp8 matrix products.*8.9"):
        capable(torch.device("cuda"), "layers.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 9))
    capable(torch.device("cuda"), "layers.0")


def test_offloaded_weights_come_back():
    """On the meta device only the bookkeeping is there: which weights may leave, and what is refused meanwhile."""
    from veneer.simulate import without_storage

    model = without_storage(llama())
    vn.attach(model, vn.LoRA(2, at="attn.q") + vn.DoRA(2, at="attn.v"))
    vn.optimize(model, compile=False, base_compute="fp8", offload_base=True)
    away = [n for n in products(model) if model.get_submodule(n).__dict__["_veneer_product"].away]
    assert len(away) == 12 and not any("v_proj" in n for n in away)  # DoRA reads its weight
    with pytest.raises(vn.AdapterError, match="in CPU memory"):
        vn.attach(model, vn.LoRA(2), name="more")
    with pytest.raises(vn.MergeError, match="in CPU memory"):
        vn.merge(model)
    vn.unoptimize(model)
    vn.attach(model, vn.LoRA(2), name="more")
