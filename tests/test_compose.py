"""Mixtures, fusion, and trained adapters within new plans."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import veneer as vn
from helpers import build, fresh, grads, look, loss, refuses, shake, unchanged
from zoo import ZOO

KINDS = ("bert", "llama", "t5")
PLANS = {
    "mixture": lambda: vn.mixture(vn.LoRA(3, at="linear"), experts=3),
    "top-1": lambda: vn.mixture(vn.Bottleneck(3, activation="gelu"), vn.Bottleneck(5, activation="gelu"), top_k=1),
    "prefixes": lambda: vn.mixture(vn.Prefix(3), experts=2, per="example"),
    "scales": lambda: vn.mixture(vn.IA3(), experts=2),
    "biases": lambda: vn.mixture(vn.BitFit(), experts=2),
    "fuse": lambda: vn.fuse(vn.Bottleneck(3, activation="gelu"), vn.Bottleneck(4, activation="gelu")),
    "fuse-lora": lambda: vn.fuse(vn.LoRA(2), vn.LoRA(3)),
    "frozen": lambda: vn.frozen(vn.LoRA(2)) + vn.Bottleneck(3, activation="gelu"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANS)
def test_contract(kind, name, tmp_path):
    plan = PLANS[name]()
    assert vn.Plan.from_dict(plan.to_dict()) == plan and str(plan)
    model, inputs = fresh(kind)
    try:
        adapter = vn.attach(model, plan, name="a")
    except vn.SiteError as e:
        assert name == "biases" and "bias" in str(e)
        return
    before = look(build(kind), inputs)
    if all(m.identity_at_init for m in plan.leaves()):
        torch.testing.assert_close(look(model, inputs), before, atol=1e-5, rtol=1e-4)
    shake(adapter)
    loss(model.train(), inputs).backward()
    model.eval()
    assert all(p.grad is None for n, p in model.named_parameters() if "_veneer" not in n)
    still = {n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert name == "top-1" or not {n for n in still if ".key:" not in n and ".k:" not in n}, still  # an expert never chosen; a key's bias
    after = look(model, inputs)
    vn.save(model, tmp_path / "a", name="a")
    other = build(kind)
    vn.load(other, tmp_path / "a", name="b")
    assert torch.equal(look(other, inputs), after)
    rows = {None: before}
    b = vn.attach(model, plan, name="b")
    shake(b, 7, -0.1)
    for n in ("a", "b"):
        vn.activate(model, n)
        rows[n] = look(model, inputs)
    with vn.route(model, ["a", None, "b"]):
        mixed = look(model, inputs)
    for i, n in enumerate(("a", None, "b")):
        torch.testing.assert_close(mixed[i], rows[n][i], atol=2e-5, rtol=1e-4)
    vn.detach(model)
    assert torch.equal(look(model, inputs), before)


def linear_model():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    return model, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_is_its_equation(top_k):
    model, x = linear_model()
    adapter = vn.attach(model, vn.mixture(vn.LoRA(2, at="name:0"), experts=3, top_k=top_k))
    shake(adapter, scale=1.0)
    parts = adapter.parts
    p = torch.softmax(x @ parts[0].gate.router.weight.T, -1)
    if top_k:
        kept = p >= p.topk(2, -1).values[..., -1:]
        p = torch.where(kept, p, 0) / torch.where(kept, p, 0).sum(-1, keepdim=True)
    h = model[0].weight @ x.mT + model[0].bias[:, None]
    want = h.mT + sum(p[..., k : k + 1] * (2 * x @ parts[k].A.T @ parts[k].B.T) for k in range(3))
    torch.testing.assert_close(model(x), model[2](torch.tanh(want)))


def test_the_balance_loss_is_its_equation():
    model, x = linear_model()
    adapter = vn.attach(model, vn.mixture(vn.LoRA(2, at="name:0"), experts=3, balance=0.5))
    shake(adapter, scale=1.0)
    model.train()(x)
    p = torch.softmax(x @ adapter.parts[0].gate.router.weight.T, -1).reshape(-1, 3)
    share = F.one_hot(p.argmax(-1), 3).float().mean(0)
    found = vn.penalty(model)
    torch.testing.assert_close(found, 0.5 * 3 * (share * p.mean(0)).sum())
    found.backward()
    assert adapter.parts[0].gate.router.weight.grad.abs().sum() > 0
    assert float(vn.penalty(model.eval())) == 0


def test_the_balance_counts_once_however_many_parts_an_expert_has():
    losses = []
    for expert in (vn.LoRA(2, at="name:0"), vn.LoRA(2, at="name:0") + vn.IA3(at="name:0", on="output")):
        model, x = linear_model()
        adapter = vn.attach(model, vn.mixture(expert, experts=2))
        with torch.no_grad():
            adapter.parts[0].gate.router.weight.copy_(torch.linspace(-1, 1, 12).reshape(2, 6))
        model.train()(x)
        losses.append(vn.penalty(model))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("plan", [vn.LoRA(6, init="eva", at="linear"), vn.FisherMask(0.05, at="linear"), vn.Prefix(3, reparameterize=4)])
def test_a_used_adapter_brings_its_numbers_and_needs_no_data(plan):
    model, inputs = fresh("bert")
    shake(vn.attach(model, plan, name="one", batches=[inputs], loss=lambda out: out.logits.square().mean()))
    alone = look(model, inputs)
    vn.attach(model, vn.use("one") + vn.Bottleneck(3), name="two")
    assert torch.equal(look(model, inputs), alone)


def test_fusion_is_its_equation():
    model, x = linear_model()
    adapter = vn.attach(model, vn.fuse(vn.LoRA(2, at="name:0"), vn.LoRA(1, at="name:0")))
    shake(adapter, scale=1.0)
    h = x @ model[0].weight.T + model[0].bias
    d = torch.stack([2 * x @ p.A.T @ p.B.T for p in adapter.parts], -2)
    a = adapter.parts[0].gate.attend
    s = torch.softmax(((h @ a.query.T)[..., None, :] * (d @ a.key.T)).sum(-1) / math.sqrt(6), -1)
    want = h + (s[..., None] * (d @ a.value.T)).sum(-2)
    torch.testing.assert_close(model(x), model[2](torch.tanh(want)))
    report = vn.gates(model, [x])
    torch.testing.assert_close(torch.tensor([r["mean"] for r in report.rows]), s.mean((0, 1)))
    assert [r["method"] for r in report.rows] == ["lora#1", "lora#2"]


@pytest.mark.parametrize("route", [["f", None, "f"], ["f", "f", "other"], ["other", "f", "f"]])
def test_attention_of_routed_rows_counts_their_own_tokens(route):
    model, inputs = fresh("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for row, padding in enumerate((4, 2, 1)):
        inputs["attention_mask"][row, -padding:] = 0
    vn.attach(model, vn.LoRA(2), name="other")
    shake(vn.attach(model, vn.fuse(vn.Bottleneck(3), vn.Bottleneck(4)), name="f"), scale=1.0)
    mine = torch.tensor([i for i, name in enumerate(route) if name == "f"])
    alone = vn.gates(model, [{k: v[mine] for k, v in inputs.items()}], "f")
    with vn.route(model, route):
        mixed = vn.gates(model, [inputs], "f")
    for a, b in zip(alone.rows, mixed.rows, strict=True):
        assert b == pytest.approx(a, abs=1e-5)


def test_trained_adapters_are_taken_by_name_and_held(tmp_path):
    model, inputs = fresh("bert")
    for i, name in enumerate(("one", "two")):
        shake(vn.attach(model, vn.Bottleneck(4, activation="gelu"), name=name), seed=i)
    before = {n: look_at(model, n, inputs) for n in ("one", "two", None)}
    fused = vn.attach(model, vn.fuse(vn.use("one"), vn.use("two")), name="both")
    assert fused.plan == vn.fuse(vn.frozen(vn.Bottleneck(4, activation="gelu")), vn.frozen(vn.Bottleneck(4, activation="gelu")))
    layers = model.config.num_hidden_layers
    assert fused.num_parameters == layers * 3 * 32 * 32  # Q, K and V alone
    loss(model, inputs).backward()
    assert set(grads(fused)) == {n for n, _ in fused.named_parameters()}
    assert all(p.grad is None for part in fused.parts for n, p in part.named_parameters() if not n.startswith("gate."))
    for n in ("one", "two", None):
        assert torch.equal(look_at(model, n, inputs), before[n])  # the adapters stay as they were
    after = look_at(model, "both", inputs)
    vn.save(model, tmp_path / "both", name="both")
    other = build("bert")  # which has neither of the two
    vn.load(other, tmp_path / "both")
    assert torch.equal(look(other, inputs), after)


def look_at(model, name, inputs):
    vn.activate(model, name)
    return look(model, inputs)


def test_a_task_over_a_language():
    model, inputs = fresh("bert")
    shake(vn.attach(model, vn.Bottleneck(4), name="language"))
    language = look(model, inputs)
    task = vn.attach(model, vn.use("language") >> vn.Bottleneck(3, activation="gelu"), name="task")
    torch.testing.assert_close(look(model, inputs), language)  # the task starts as the identity over the language
    shake(task)
    assert not torch.allclose(look(model, inputs), language, atol=1e-4)
    site = task.parts[0].site
    stages = {p.stage for p in task.parts}
    assert stages == {0, 1} and site.role == "ffn"


def test_gates_over_trained_adapters_keep_their_scale():
    model, inputs = fresh("bert")
    shake(vn.attach(model, vn.LoRA(2, alpha=7), name="one"))
    alone = look(model, inputs)
    gated = vn.attach(model, vn.gated(vn.use("one"), bias=40.0, per="constant"), name="which")
    torch.testing.assert_close(look(model, inputs), alone, atol=1e-5, rtol=1e-4)
    assert gated.num_parameters == len(gated.parts)
    report = vn.settle(model, [inputs], name="which")
    torch.testing.assert_close(look(model, inputs), alone, atol=1e-5, rtol=1e-4)
    assert report.plan == vn.frozen(vn.LoRA(2, alpha=7))


def test_a_mixture_settles_to_a_sum():
    model, inputs = fresh("bert")
    a = vn.attach(model, vn.mixture(vn.LoRA(2), experts=2), name="m")
    shake(a)
    report = vn.settle(model, [inputs], name="m")
    assert report.plan == vn.LoRA(2) + vn.LoRA(2)
    vn.merge(model, "m")


def test_caches_and_padding_change_nothing():
    kind = ZOO["llama"]
    model, inputs = kind.build(), kind.inputs(2, 6)
    adapter = vn.attach(model, vn.mixture(vn.LoRA(2), experts=2))
    shake(adapter)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, use_cache=True, **options), model.generate(**inputs, use_cache=False, **options))
    short = {k: v[1:, :4] for k, v in inputs.items()}  # the second row's padding is at its end
    n = int(short["attention_mask"].sum())
    torch.testing.assert_close(look(model, short)[:, :n], look(model, inputs)[1:, :n], atol=1e-5, rtol=1e-4)


def test_refusals():
    with refuses(vn.PlanError, "one expert", "experts=4"):
        vn.mixture(vn.LoRA(2))
    with refuses(vn.PlanError, "experts=1 copies"):
        vn.mixture(vn.LoRA(2), experts=1)
    with refuses(vn.PlanError, "top_k must be from 1 to 2"):
        vn.mixture(vn.LoRA(2), vn.LoRA(2), top_k=3)
    with refuses(vn.PlanError, "per is 'tokens'", "'token'"):
        vn.mixture(vn.LoRA(2), vn.LoRA(2), per="tokens")
    with refuses(vn.PlanError, "a gate within a gate"):
        vn.mixture(vn.gated(vn.LoRA(2)), vn.LoRA(2))
    with refuses(vn.PlanError, "one adapter"):
        vn.fuse(vn.LoRA(2))
    with refuses(vn.PlanError, "takes plans"):
        vn.fuse("sst2", "mnli")
    with refuses(vn.PlanError, "taken from a model", "Attach"):
        list(vn.use("a").leaves())
    assert vn.Plan.from_dict((vn.use("a") >> vn.use("b", train=True) + vn.LoRA(2)).to_dict()) == vn.use("a") >> vn.use("b", train=True) + vn.LoRA(2)
    model, inputs = fresh("bert")
    with refuses(vn.PlanError, "mixture", "number 2 of 2 does not act here", "same at", model=model):
        vn.attach(model, vn.mixture(vn.LoRA(2, at="attn.q"), vn.LoRA(2, at="attn.v")))
    with refuses(vn.PlanError, "prefix does not add to a state", "vn.gated", model=model):
        vn.attach(model, vn.fuse(vn.Prefix(2), vn.Prefix(2)))
    with refuses(vn.AdapterError, "nothing is attached", model=model):
        vn.attach(model, vn.use("one") + vn.LoRA(2))
    vn.attach(model, vn.gated(vn.LoRA(2)), name="one")
    with unchanged(model), refuses(vn.AdapterError, "no adapter called 'two'", "one"):
        vn.attach(model, vn.use("two") + vn.LoRA(2), name="n")
    with unchanged(model), refuses(vn.PlanError, "a gate within a gate"):
        vn.attach(model, vn.gated(vn.use("one")), name="n")
    vn.attach(model, vn.fuse(vn.LoRA(2), vn.LoRA(2)), name="f")
    with unchanged(model), refuses(vn.CapabilityError, "weighed by attention", "mixture"):
        vn.settle(model, [inputs], name="f")
    with unchanged(model), refuses(vn.CapabilityError, "vary with the input"):
        vn.merge(model, "f")
