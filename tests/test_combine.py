"""A new adapter as a weighted sum of trained ones."""

from __future__ import annotations

import pytest
import torch

import veneer as vn
from helpers import fresh, look, refuses, shake, unchanged
from veneer.combine import _sum, _trim


def two(plan="lora", kind="bert", **options):
    model, inputs = fresh(kind)
    for i, name in enumerate("ab"):
        p = vn.LoRA(2 + i, at="linear") if plan == "lora" else plan
        shake(vn.attach(model, p, name=name, activate=False), seed=i)
    return model, inputs


def dense(model, name):
    return {p.site.path: p.fold(p.weight(), None)[0].detach() for p in vn.Adapter(model, name).parts}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "mixtral"])
def test_cat_is_the_exact_sum(kind):
    model, inputs = two(kind=kind)
    a, b = dense(model, "a"), dense(model, "b")
    made = vn.combine(model, {"a": 0.3, "b": -1.5}, name="c", how="cat")
    c = dense(model, "c")
    assert made.rank == 5 and made.error == 0 and "rank 5" in str(made)
    for path in c:
        torch.testing.assert_close(c[path], 0.3 * a[path] - 1.5 * b[path], atol=1e-5, rtol=1e-4)
    vn.activate(model, "c")
    out = look(model, inputs)
    vn.merge(model, "c")
    torch.testing.assert_close(look(model, inputs), out, atol=1e-4, rtol=1e-3)


def test_the_mean_of_both_at_once_is_what_both_do_at_half():
    model, inputs = two()
    vn.combine(model, {"a": 1.0, "b": 1.0}, name="c", how="cat")
    one = look(model, inputs)
    vn.activate(model, ["a", "b"])
    torch.testing.assert_close(look(model, inputs), one, atol=1e-4, rtol=1e-3)


def test_svd_is_the_closest_of_its_rank():
    model, _ = two()
    a, b = dense(model, "a"), dense(model, "b")
    made = vn.combine(model, ["a", "b"], name="c", how="svd", rank=4)
    c = dense(model, "c")
    worst = 0.0
    for path in c:
        whole = (a[path] + b[path]) / 2
        s = torch.linalg.svdvals(whole)
        torch.testing.assert_close((whole - c[path]).norm(), s[4:].norm(), atol=1e-4, rtol=1e-3)
        worst = max(worst, float(s[4:].norm() / s.norm()))
    assert made.error == pytest.approx(worst, rel=1e-3)
    assert vn.combine(model, ["a", "b"], name="d", how="svd", rank=5).error < 1e-5  # the sum's own rank
    assert vn.combine(model, ["a", "b"], name="e", how="svd").rank == 3


def test_ties_by_hand():
    one, two = torch.tensor([[4.0, -1.0, 3.0, 0.1]]), torch.tensor([[2.0, 5.0, -2.0, -0.2]])
    assert torch.equal(_trim(one, 0.5), torch.tensor([[4.0, 0.0, 3.0, 0.0]]))
    # trimmed: [4 0 3 0] and [2 5 0 0]; signs + + + ?; means of those that agree: 3, 5, 3, 0, at the whole weight 1
    found = _sum([(0.5, one, None), (0.5, two, None)], "ties", 0.5, torch.Generator())
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 3.0, 0.0]]))
    # without trimming, the third entry's signs differ and the larger sum wins
    found = _sum([(0.5, one, None), (0.5, two, None)], "ties", 1.0, torch.Generator())
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 3.0, -0.2]]))


def test_dare_keeps_the_mean():
    g = torch.Generator().manual_seed(0)
    d = torch.randn(40, 30, generator=g)
    many = torch.stack([_sum([(1.0, d, None)], "dare", 0.5, g) for _ in range(400)])
    kept = (many[0] != 0).float().mean()
    assert 0.4 < float(kept) < 0.6
    torch.testing.assert_close(many[0][many[0] != 0], 2 * d[many[0] != 0])
    assert float((many.mean(0) - d).abs().max()) < 0.5


@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare", "dare-ties"])
def test_equal_adapters_give_themselves_back(how):
    model, inputs = fresh("bert")
    for name in "ab":
        torch.manual_seed(0)
        shake(vn.attach(model, vn.LoRA(3) + vn.Full(at="norm"), name=name), seed=1)
    one = look(model, inputs)
    vn.combine(model, ["a", "b"], name="c", how=how, density=1.0, rank=6)
    torch.testing.assert_close(look(model, inputs), one, atol=1e-4, rtol=1e-3)


def test_other_linear_methods_become_low_rank():
    model, inputs = fresh("bert")
    shake(vn.attach(model, vn.IA3(on="input", at="linear"), name="a"))
    one = look(model, inputs)
    made = vn.combine(model, {"a": 1.0}, name="b", how="svd", rank=32)
    assert made.rank == 32
    torch.testing.assert_close(look(model, inputs), one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("plan", [vn.VeRA(4, at="linear"), vn.LoRA(2, init="pissa"), vn.LoRAXS(2)])
def test_cat_takes_whatever_has_factors(plan):
    model, inputs = fresh("bert")
    shake(vn.attach(model, plan, name="a"))
    one = look(model, inputs)
    vn.combine(model, {"a": 1.0}, name="b", how="cat")
    torch.testing.assert_close(look(model, inputs), one, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("plan", [vn.Bottleneck(3), vn.Prefix(2), vn.gated(vn.LoRA(2) + vn.Prefix(2)), vn.BitFit()])
def test_linear_averages_any_method(plan, tmp_path):
    model, inputs = two(plan)
    made = vn.combine(model, {"a": 0.25, "b": 0.75}, name="c")
    assert made.adapter.plan == plan
    own = {n: dict(vn.Adapter(model, n).named_parameters()) for n in "abc"}
    for key, p in own["c"].items():
        torch.testing.assert_close(p, 0.25 * own["a"][key] + 0.75 * own["b"][key])
    vn.save(model, tmp_path / "c", name="c")


def test_refusals():
    model, _ = two()
    vn.attach(model, vn.gated(vn.LoRA(2)), name="g")
    vn.attach(model, vn.Bottleneck(3), name="n")
    vn.attach(model, vn.IA3(), name="i")
    with unchanged(model):
        with refuses(vn.AdapterError, "no adapter called 'z'"):
            vn.combine(model, ["a", "z"], name="c")
        with refuses(vn.AdapterError, "combine needs adapters"):
            vn.combine(model, [], name="c")
        with refuses(vn.AdapterError, "attached already"):
            vn.combine(model, ["a", "b"], name="a", how="cat")
        with refuses(vn.CapabilityError, "different plans", "svd"):
            vn.combine(model, ["a", "b"], name="c")
        with refuses(vn.CapabilityError, "gate", "settle"):
            vn.combine(model, ["a", "g"], name="c", how="cat")
        with refuses(vn.CapabilityError, "bottleneck .in 'n'. is not linear"):
            vn.combine(model, ["a", "n"], name="c", how="svd")
        with refuses(vn.CapabilityError, "ia3 has no low-rank factors", "svd"):
            vn.combine(model, ["i"], name="c", how="cat")
        vn.attach(model, vn.IA3(on="output", at="linear"), name="o", activate=False)
        shake(vn.Adapter(model, "o"))
        with refuses(vn.CapabilityError, "ia3 changes a bias too", "linear"):
            vn.combine(model, ["o"], name="c", how="svd", rank=4)
        vn.detach(model, "o")
        vn.attach(model, vn.LoRA(2) >> vn.LoRA(2), name="s", activate=False)
        with refuses(vn.CapabilityError, "'s' is a stack", "linear"):
            vn.combine(model, ["s"], name="c", how="svd")
        vn.detach(model, "s")
        vn.attach(model, vn.DoRA(2), name="m", activate=False)
        with refuses(vn.CapabilityError, "dora has no low-rank factors", "svd"):
            vn.combine(model, ["a", "m"], name="c", how="cat")
        vn.detach(model, "m")
        with refuses(vn.PlanError, "no rank of its own", "rank=16"):
            vn.combine(model, ["i"], name="c", how="ties")
        with refuses(vn.PlanError, "how is 'tie'", "ties"):
            vn.combine(model, ["a", "b"], name="c", how="tie")
        with refuses(vn.PlanError, "density"):
            vn.combine(model, ["a", "b"], name="c", how="ties", density=0)
        with refuses(vn.PlanError, "the weight of 'a'"):
            vn.combine(model, {"a": float("nan"), "b": 1}, name="c", how="cat")
