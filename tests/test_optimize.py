"""vn.optimize changes nothing but the time: outputs, gradients, and everything after it is undone."""

import copy

import pytest
import torch
import torch._dynamo.testing
import transformers as tf

import veneer as vn
from veneer.ops.loss import linear_cross_entropy, loss_and_slope, reference

# the compiler looks at .grad of the layers' inputs, for itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def llama(**kw):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, **kw)
    )


def bert():
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    ).eval()


def t5():
    torch.manual_seed(0)
    return tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, decoder_start_token_id=0)).eval()


MODELS = {"llama": llama, "bert": bert, "t5": t5}
PLANS = {
    "lora": lambda: vn.LoRA(4, at="linear"),
    "ia3": vn.IA3,
    "bottleneck": lambda: vn.Bottleneck(8),
    "prefix": lambda: vn.Prefix(3),
    "gated": lambda: vn.gated(vn.Bottleneck(8) + vn.Prefix(3) + vn.LoRA(4)),
    "mixed": lambda: vn.LoRA(4, at="linear") + vn.Bottleneck(8) + vn.IA3(),
    "dora": lambda: vn.DoRA(4, at="linear"),
    "gated-tokens": lambda: vn.gated(vn.LoRA(4, at="linear"), per="token"),
}


def adapted(model, plan, name="default"):
    torch.manual_seed(1)
    vn.attach(model, plan, name=name)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def batch(kind):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (2, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = torch.tensor([0, 1]) if kind == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **({} if kind == "bert" else {"use_cache": False})}


def step(model, inputs):
    for p in model.parameters():
        p.grad = None
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(a, b, tol=1e-5):
    torch.testing.assert_close(a[0], b[0], rtol=tol, atol=tol)
    assert a[1].keys() == b[1].keys() and a[1]
    for n in a[1]:
        torch.testing.assert_close(a[1][n], b[1][n], rtol=1e-4, atol=tol, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "plan"), [*(("llama", p) for p in PLANS), ("bert", "lora"), ("bert", "gated"), ("t5", "lora"), ("t5", "prefix")])
def test_layers_compile_without_graph_breaks(kind, plan):
    torch._dynamo.reset()
    model, inputs = adapted(MODELS[kind](), PLANS[plan]()), batch(kind)
    plain = step(model, inputs)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if plan == "lora" else "eager")
    vn.optimize(model, compile={"backend": count, "fullgraph": True})
    same(plain, step(model, inputs))
    # like layers share their compilation: the first layer may differ, and an encoder and a decoder do
    assert 0 < count.frame_count <= (4 if kind == "t5" else 2)
    vn.unoptimize(model)
    same(plain, step(model, inputs))


@pytest.mark.parametrize(("kind", "plan"), [*((k, "lora") for k in MODELS), *((k, p) for k in ("llama", "bert") for p in ("dora", "gated", "gated-tokens"))])
def test_fused_alone(kind, plan):
    model, inputs = adapted(MODELS[kind](), PLANS[plan]()), batch(kind)
    plain = step(model, inputs)
    vn.optimize(model, compile=False)
    assert any(h.recipe is not None and h.recipe.bundle is not None for h in model._veneer_state.hosts.values())
    same(plain, step(model, inputs))
    same(plain, step(copy.deepcopy(model), inputs))


def test_three_maps_share_a_product_and_a_stray_call_is_answered_alone():
    model = adapted(llama().eval(), vn.LoRA(4, at="linear"))
    attn, x = model.model.layers[0].self_attn, torch.randn(1, 3, 32)
    maps = (attn.q_proj, attn.k_proj, attn.v_proj)
    plain = [m(x) for m in maps]
    vn.optimize(model, compile=False)
    hosts = model._veneer_state.hosts
    q, k, o = (hosts[f"model.layers.0.self_attn.{n}_proj"].recipe.bundle for n in "qko")
    assert q is k and o is not q and len(q.members) == 3 and len(o.members) == 1
    for m, y in zip(maps, plain, strict=True):
        torch.testing.assert_close(m(x), y)
    assert q.x is None and not q.apart
    maps[0](x)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj._veneer.get_parameter("@default.0.B").mul_(2)
    torch.testing.assert_close(maps[1](x), plain[1] + (plain[1] - torch.nn.functional.linear(x, maps[1].weight)))
    torch.testing.assert_close(maps[1](x * 2), 2 * maps[1](x))
    assert q.apart and q.x is None


def test_what_comes_after_optimizing():
    """Activate, disable, route, merge and another attach act on a compiled model as on a plain one."""
    inputs = batch("llama")
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    plain, fast = (adapted(llama().eval(), vn.LoRA(4, at="linear"), "a") for _ in range(2))
    base = llama().eval()(**inputs).logits
    vn.optimize(fast, compile={"backend": "eager"})
    for m in (plain, fast):
        m(**inputs)
        adapted(m, vn.LoRA(2) + vn.Bottleneck(4), "b")

    def both(how):
        torch.testing.assert_close(how(plain), how(fast), rtol=1e-5, atol=1e-5)

    def logits(m):
        return m(**inputs).logits

    def routed(m):
        with vn.route(m, ["a", "b"]):
            return logits(m)

    def merged(m):
        vn.activate(m, "a")
        vn.merge(m, "a")
        y = logits(m)
        vn.unmerge(m)
        return y

    both(logits)
    for names in ("a", "b", ["a", "b"], None):
        for m in (plain, fast):
            vn.activate(m, names)
        both(logits)
    both(routed)
    both(merged)
    with vn.disabled(fast):
        torch.testing.assert_close(logits(fast), base)
    vn.detach(fast)
    torch.testing.assert_close(logits(fast), base)
    assert all(m._compiled_call_impl is None for m in fast.modules()) and "forward" not in fast.lm_head.__dict__


def test_training_loss_without_logits():
    model, inputs = adapted(llama(), vn.LoRA(4)), batch("llama")
    for count in (None, torch.tensor(17)):
        more = {} if count is None else {"num_items_in_batch": count}
        plain = step(model, {**inputs, **more})
        vn.optimize(model, compile=False)
        assert model(**inputs).logits is None
        same(plain, step(model, {**inputs, **more}))
        assert model.eval()(**inputs).logits.shape == (2, 7, 50)
        assert model.train()(inputs["input_ids"]).logits.shape == (2, 7, 50)
        assert len(model(**inputs, return_dict=False)) == 1
        vn.unoptimize(model)
        assert model(**inputs).logits is not None


def test_logits_that_the_model_changes_first():
    """A soft cap needs the logits: they are made, and the loss is the model's own."""
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=50,
        final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    model, inputs = adapted(tf.Gemma2ForCausalLM(config), vn.LoRA(4)), batch("llama")
    plain = step(model, inputs)
    vn.optimize(model, compile=False)
    same(plain, step(model, inputs))


def test_a_trained_or_adapted_head_keeps_its_logits():
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear,head")), batch("llama")
    plain = step(model, inputs)
    vn.optimize(model, compile=False)
    same(plain, step(model, inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_and_gradient_checkpointing(dropout):
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear", dropout=dropout)), batch("llama")

    def seeded():
        torch.manual_seed(5)
        return step(model, inputs)

    plain = seeded()
    vn.optimize(model, compile=False)
    if not dropout:  # the masks are drawn in the same order only map by map
        same(plain, seeded())
    fused = seeded()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(fused, seeded())


def test_autocast_takes_the_general_path():
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, inputs)
        vn.optimize(model, compile=False)
        same(plain, step(model, inputs))


def test_half_precision_base():
    model, inputs = adapted(llama().bfloat16(), vn.LoRA(4, at="linear")), batch("llama")
    exact, plain = step(copy.deepcopy(model).float(), inputs)[1], step(model, inputs)[1]
    vn.optimize(model, compile=False)

    def error(grads):
        return torch.stack([(grads[n].float() - g).norm() / g.norm() for n, g in exact.items()]).mean()

    ours = step(model, inputs)[1]
    assert all(g.dtype == torch.float32 for g in ours.values())
    assert error(ours) < 1.5 * error(plain) < 0.1


def test_errors():
    model = llama()
    with pytest.raises(vn.AdapterError, match="nothing is attached"):
        vn.optimize(model)
    vn.attach(model, vn.LoRA(4))
    with pytest.raises(vn.AdapterError, match="not optimised"):
        vn.unoptimize(model)
    vn.optimize(model)
    with pytest.raises(vn.AdapterError, match="optimised already"):
        vn.optimize(model)


def test_backward_stops_at_the_lowest_adapted_layer():
    model = adapted(llama(), vn.LoRA(4, at="linear@2:"))
    seen = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, y, i=i: seen.append((i, y.requires_grad)) or None)
    vn.optimize(model, compile=False)
    step(model, batch("llama"))
    assert seen == [(0, False), (1, False), (2, True)]


def test_adamw():
    model = adapted(llama(), vn.LoRA(4))
    optimizer = vn.adamw(model, lr=1e-3)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    step(model, batch("llama"))
    optimizer.step()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [None, 5.0])
@pytest.mark.parametrize("chunk", [3, 100])
def test_linear_cross_entropy(bias, count, chunk):
    torch.manual_seed(0)
    h, w = torch.randn(2, 5, 6, requires_grad=True), torch.randn(11, 6)
    b, labels = torch.randn(11) if bias else None, torch.randint(0, 11, (2, 5))
    labels[0, 2:] = -100
    for y in (labels, labels.clamp(min=0)):
        ours = linear_cross_entropy(h, w, b, y, count, chunk=chunk)
        plain = reference(h.flatten(0, 1), w, b, y.flatten(), count)
        torch.testing.assert_close(ours, plain)
        a, p = (torch.autograd.grad(3 * loss, h)[0] for loss in (ours, plain))
        torch.testing.assert_close(a, p, rtol=1e-4, atol=1e-5)
    none = torch.full_like(labels, -100)
    assert torch.autograd.grad(linear_cross_entropy(h, w, b, none, count), h)[0].abs().max() == 0


def test_both_slopes_agree():
    from veneer.ops.loss import in_place

    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, -100, 3, 4, -100])
    for a, b in zip(loss_and_slope(logits.clone(), labels, -100), in_place(logits.clone(), labels, -100), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("plan", ["lora", "gated", "prompt", "mixed"])
def test_no_plan_brings_the_logits_back(plan, monkeypatch):
    """What a plan puts round the model itself (gates' and prompts' frames) hides neither its labels nor its loss."""
    from veneer.head import Pending

    made = []
    own = Pending.tensor
    monkeypatch.setattr(Pending, "tensor", lambda self: made.append(1) or own(self))
    plans = {**PLANS, "prompt": lambda: vn.PromptTuning(3)}
    model, inputs = adapted(llama(), plans[plan]()), batch("llama")
    plain = step(model, inputs)
    vn.optimize(model, compile=False)
    same(plain, step(model, inputs))
    assert model(**inputs).logits is None and not made


@pytest.mark.parametrize("per", ["example", "token", "constant"])
def test_fused_gates_generate_and_report_as_ever(per):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    seen = []
    for fast in (False, True):
        model = adapted(llama().eval(), vn.gated(vn.LoRA(4, at="linear"), per=per))
        if fast:
            vn.optimize(model, compile=False)
            assert model._veneer_state.hosts["model.layers.0.self_attn.q_proj"].recipe.bundle is not None
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            last = model(out, use_cache=True).logits
        seen.append((out, last, [(r["path"], r["mean"]) for r in vn.gates(model, [{"input_ids": ids}]).rows]))
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1])
    assert [p for p, _ in seen[0][2]] == [p for p, _ in seen[1][2]]
    torch.testing.assert_close(torch.tensor([m for _, m in seen[0][2]]), torch.tensor([m for _, m in seen[1][2]]))


@pytest.mark.parametrize("plan", ["lora", "gated", "prefix"])
def test_checkpointed_layers_compile_whole(plan):
    torch._dynamo.reset()
    model, inputs = adapted(llama(), PLANS[plan]()), batch("llama")
    plain = step(model, inputs)
    before = torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint
    vn.optimize(model, compile={"backend": "aot_eager", "fullgraph": True})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(plain, step(model, inputs))
    vn.unoptimize(model)
    assert torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint is before
    same(plain, step(model, inputs))
