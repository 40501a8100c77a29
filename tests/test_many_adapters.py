"""Rows with adapters of their own, by stacks: the same as each adapter alone, in inference and in training."""

import copy

import pytest
import torch
import torch._dynamo.testing
import transformers as tf

import veneer as vn
from veneer.ops import gemv, routed

NAMES = ["a", "b", "c", "d"]
ROUTES = {
    "each its own": ["a", "b", "c", "d"],
    "in runs": ["b", "b", "a", "a"],
    "apart": ["a", "d", None, "a"],
    "several": [["a", "b"], "c", None, ["b", "a"]],
    "one": ["c"] * 4,
}


def llama(**kw):
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**size, **kw})).eval()


def mixed(model=None, dropout=0.0):
    """Adapters of several ranks, scales and places."""
    model = model or llama()
    for i, (r, at) in enumerate(((4, "linear"), (2, "linear"), (4, "attn.{q,v}"), (3, "linear"))):
        torch.manual_seed(i)
        handle = vn.attach(model, vn.LoRA(r, alpha=3 + i, dropout=dropout, at=at), name=NAMES[i])
        stir(handle)
    return model


def stir(handle, by=0.1):
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p) * by)


def batch():
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def stacked(model):
    """How many maps of the last routing have their parts in stacks."""
    return sum(h.prepared[0] is not None and h.prepared[0].slots is not None for h in model._veneer_state.hosts.values())


def alone(model, inputs, rows):
    out = []
    for i, names in enumerate(rows):
        vn.activate(model, names)
        out.append(model(**{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}).logits)
    return torch.cat(out)


def real(logits, inputs):
    return logits[inputs["attention_mask"].bool()]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# the compiler looks at .grad of the stacks, for itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


# -- arithmetic -------------------------------------------------------------------------------------------------------
def operands(index, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    size = 3 if index else 4
    shapes = ((8, 3, 6), (8, 3, 10), (size, 2, 6), (size, 10, 2))
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def by_stacks(x, y, a, b, index):
    at = torch.tensor(index) if index else None
    return routed.add(y, routed.low(x, a, at), b, at)


@pytest.mark.parametrize("index", [None, [1, 0, 2, 1]], ids=["in order", "looked up"])
def test_stacks_equal_the_reference(index):
    x, y, a, b = operands(index)
    each = [e for e in (index or range(4)) for _ in range(2)]
    ours, plain = by_stacks(x, y, a, b, index), routed.reference(x, y, a, b, each)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    weight = torch.randn(ours.shape)
    for p, q in zip(*(torch.autograd.grad((out * weight).sum(), (x, y, a, b)) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # in place, where nothing looks back
        kept = y.clone()
        torch.testing.assert_close(by_stacks(x, kept, a, b, index), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)
    half = [t.detach().bfloat16().requires_grad_() for t in (x, y, a, b)]
    exact = [t.detach().float().requires_grad_() for t in half]
    outs = by_stacks(*half, index), routed.reference(*exact, each)
    assert (outs[0].float() - outs[1]).norm() / outs[1].norm() < 1e-2
    for p, q in zip(*(torch.autograd.grad((o.float() * weight).sum(), ts) for o, ts in zip(outs, (half, exact), strict=True)), strict=True):
        assert (p.float() - q).norm() / q.norm() < 1e-2


@pytest.mark.parametrize("alike", [True, False])
def test_a_stack_has_every_tensor_in_its_place_and_gives_back_its_gradient(alike):
    second = (2, 5) if alike else (2, 4)
    boxes = [(0, 0, 2, 0, 3), (1, 0, 2, 0, 3), (0, *second, 0, 3), (1, *second, 0, 3)]
    places = routed.Places((2, 5, 3), boxes)
    assert (places.blocks is not None) and places.full == alike
    if not alike:
        places = routed.Places((2, 5, 3), boxes[:3])
        assert places.blocks is None and not places.full
    tensors = [torch.randn(k - i, q - p).requires_grad_() for _, i, k, p, q in places.boxes]
    scales = [2.0, 1.0, 0.5, 3.0][: len(tensors)]
    stack = routed.Stack.apply(places, scales, torch.float32, *tensors)
    want = torch.zeros(2, 5, 3)
    for t, s, (e, i, k, p, q) in zip(tensors, scales, places.boxes, strict=True):
        want[e, i:k, p:q] = s * t.detach()
    assert torch.equal(stack, want)
    weight = torch.randn(stack.shape)
    for g, s, (e, i, k, p, q) in zip(torch.autograd.grad((stack * weight).sum(), tensors), scales, places.boxes, strict=True):
        torch.testing.assert_close(g, s * weight[e, i:k, p:q])


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels, run by Triton's interpreter."""
    monkeypatch.setattr(gemv, "SIZES", (4, 32, 16))
    monkeypatch.setattr(gemv, "EAGER", True)
    monkeypatch.setattr(gemv, "fits", lambda x, size, maps: x.numel() <= 2 * size * x.shape[-1] and not torch.is_grad_enabled())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [None, [1, 0, 2, 1]], ids=["in order", "looked up"])
@pytest.mark.parametrize("outs", [[20], [9, 7], [12, 4, 4]], ids=str)
def test_decoding_kernel(interpreted, index, outs, dtype):
    g, r, size = torch.Generator().manual_seed(0), 3, 3 if index else 4
    x, a, b = (torch.randn(s, generator=g).to(dtype) for s in ((8, 70), (size, len(outs) * r, 70), (size, sum(outs), r)))
    d = gemv.gemv(x, a, b, torch.tensor(index) if index else None, outs)
    each = [e for e in (index or range(4)) for _ in range(2)]
    ups, lows = b.float().split(outs, 1), a.float().split(r, 1)
    want = torch.cat([routed.reference(x.float(), torch.zeros(8, o), low, up, each) for o, low, up in zip(outs, lows, ups, strict=True)], 1)
    assert (d.float() - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


# -- a model ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", ROUTES.values(), ids=ROUTES)
def test_rows_and_their_gradients_are_each_adapter_alone(rows):
    model, inputs = mixed(), batch()
    weight = torch.randn(50)

    def loss(logits):
        return (real(logits, inputs) * weight).square().mean()

    separate = alone(model, inputs, rows)
    want = gradients(model, loss(separate))
    with vn.route(model, rows):
        together = model(**inputs).logits
        got = gradients(model, loss(together))
        with torch.no_grad():
            torch.testing.assert_close(real(model(**inputs).logits, inputs), real(separate, inputs), rtol=1e-4, atol=1e-5)
    assert stacked(model) == (14 if rows != ["c"] * 4 else 4)
    torch.testing.assert_close(real(together, inputs), real(separate, inputs), rtol=1e-4, atol=1e-5)
    assert want.keys() <= got.keys()
    for n, g in got.items():
        torch.testing.assert_close(g, want.get(n, torch.zeros_like(g)), rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_changed_parameters_are_seen():
    model, inputs, rows = mixed(), batch(), NAMES
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    def same():
        twin = mixed()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(real(model(**inputs).logits, inputs), real(alone(twin, inputs, rows), inputs), rtol=1e-4, atol=1e-5)

    for turn in range(2):
        with vn.route(model, rows):
            same()
            model(**inputs).logits.square().mean().backward()
            optimizer.step()
            same()  # after a step
            with torch.no_grad():
                vn.Adapter(model, "b").parts[0].A.mul_(2)
            same()  # by hand
            if turn:
                with vn.route(model, ["d", "a", None, "c"]):  # within another
                    model(**inputs)
                same()
    with vn.route(model, rows):
        vn.Adapter(model, "a").parts[0].A.data = torch.zeros(4, 32)  # torch does not count this: seen on entering
    with vn.route(model, rows):
        same()


def test_what_is_attached_loaded_or_detached_between():
    model, inputs, rows = mixed(), batch(), NAMES
    with torch.no_grad(), vn.route(model, rows):
        model(**inputs)
        stir(vn.attach(model, vn.LoRA(2, at="linear"), name="e", activate=False))
        with vn.route(model, ["e", "a", "b", "c"]):
            got = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(real(got, inputs), real(alone(model, inputs, ["e", "a", "b", "c"]), inputs), rtol=1e-4, atol=1e-5)
    vn.detach(model, "e")
    vn.detach(model, "d")
    with torch.no_grad(), vn.route(model, ["a", "b", "c", None]):
        model(**inputs)
    vn.detach(model)
    fresh = llama()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def test_saved_and_loaded(tmp_path):
    model, inputs = mixed(), batch()
    with torch.no_grad(), vn.route(model, NAMES):
        want = model(**inputs).logits
    other = llama()
    for name in NAMES:
        vn.save(model, tmp_path / name, name=name)
        vn.load(other, tmp_path / name)
    with torch.no_grad(), vn.route(other, NAMES):
        assert torch.equal(other(**inputs).logits, want)


def test_what_is_not_plain_keeps_the_general_path():
    model, inputs = mixed(), batch()
    stir(vn.attach(model, vn.gated(vn.LoRA(2, at="attn.q")) + vn.Bottleneck(3), name="g"), 0.3)
    stir(vn.attach(model, vn.DoRA(2, at="attn.v") + vn.VeRA(4, at="ffn.up"), name="h"), 0.3)
    rows = ["a", "g", "h", "d"]
    with torch.no_grad():
        with vn.route(model, rows):
            got = model(**inputs).logits
        assert stacked(model) == 8  # all but q, v and up
        torch.testing.assert_close(real(got, inputs), real(alone(model, inputs, rows), inputs), rtol=1e-4, atol=1e-5)


def test_other_bases():
    for model in (
        tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)).eval(),
        tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, decoder_start_token_id=0)).eval(),
    ):
        for i in range(2):
            torch.manual_seed(i)
            stir(vn.attach(model, vn.LoRA(2, at="linear"), name=NAMES[i]))
        inputs = batch()
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
        rows = ["a", None, "b", "a"]
        with torch.no_grad(), vn.route(model, rows):
            got = model(**inputs).logits
        assert stacked(model) > 4
        with torch.no_grad():
            torch.testing.assert_close(real(got, inputs), real(alone(model, inputs, rows), inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_a_backward_pass_after_the_route(dropout, reentrant):
    model, inputs = mixed(dropout=dropout).train(), batch()
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())

    def run():
        torch.manual_seed(5)
        with vn.route(model, ["a", "b", "d", "a"]):
            first = model(**inputs).logits.square().mean()
        with vn.route(model, ["c", "c", "d", None]):
            second = model(**inputs).logits.square().mean()
        return gradients(model, first + second)

    plain = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for n, g in run().items():
        torch.testing.assert_close(g, plain[n], rtol=1e-4, atol=1e-6)


def test_half_precision_base():
    model, inputs = mixed(llama().bfloat16()), batch()
    exact = copy.deepcopy(model).float()
    with vn.route(exact, NAMES), vn.route(model, NAMES):
        want, got = (gradients(m, real(m(**inputs).logits.float(), inputs).square().mean()) for m in (exact, model))
    errors = [(got[n].float() - g).norm() / g.norm() for n, g in want.items()]
    assert all(g.dtype == torch.float32 for g in got.values()) and max(errors) < 0.1 and sum(errors) / len(errors) < 0.03


def generated(model, rows, tokens=5, **options):
    with vn.route(model, rows):
        ids = batch()["input_ids"]
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize(("rows", "beams"), [("each its own", 1), ("apart", 2)])
def test_generation_by_the_kernel(interpreted, monkeypatch, rows, beams):
    model = mixed(llama(num_hidden_layers=1))
    want = generated(model, ROUTES[rows], 3, num_beams=beams)
    calls = []
    monkeypatch.setattr(routed, "decoded", lambda *a: calls.append(1) or gemv.gemv(*a))
    assert torch.equal(generated(model, ROUTES[rows], 3, num_beams=beams), want)
    assert len(calls) == 2 * 4  # tokens from a cache, times products


def test_generation_with_a_static_cache_compiles_once_for_all_routes():
    model = mixed()
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("eager")
    config = tf.CompileConfig(mode=None)
    config.backend, config._compile_all_devices = count, True
    frames = []
    for rows in (["a", "b", "c", "d"], ["d", "a", "c", "b"], ["a", "b", "c", "d"]):
        with torch.no_grad():
            want = generated(model, rows)
            assert torch.equal(generated(model, rows, cache_implementation="static", compile_config=config), want)
        frames.append(count.frame_count)
    assert frames[0] == frames[1] == frames[2]


def test_compiled_layers_train_as_plain_ones_and_other_rows_need_no_new_graph():
    plain, fast, inputs = mixed().train(), mixed().train(), batch()
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    vn.optimize(fast, loss=False, compile={"backend": count, "fullgraph": True})
    for rows in (["a", "b", "c", "d"], ["d", "b", "c", "a"]):
        both = []
        for m in (plain, fast):
            with vn.route(m, rows):
                both.append(gradients(m, real(m(**inputs).logits, inputs).square().mean()))
        for n, g in both[0].items():
            torch.testing.assert_close(both[1][n], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    assert count.frame_count == 2  # the first layer's input needs no gradient, the second's does
