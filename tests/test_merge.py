"""Merging: the same output, every bit back, and refusals that leave the base as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import veneer as vn
from helpers import build, fresh, look, refuses, shake, unchanged
from zoo import ZOO

PLANS = {
    "lora": lambda: vn.LoRA(3, at="linear"),
    "ia3": lambda: vn.IA3(),
    "all": lambda: vn.LoRA(2) + vn.IA3() + vn.BitFit() + vn.Full(at="head"),
    "constant": lambda: vn.gated(vn.LoRA(2, at="linear") + vn.IA3() + vn.BitFit(), per="constant", bias=0.7),
    "twice": lambda: vn.LoRA(2) + vn.LoRA(3, at="attn") + vn.BitFit() + vn.BitFit(at="attn"),
    "stack": lambda: vn.LoRA(2, at="attn.q") >> vn.IA3(at="attn.q") >> vn.LoRA(3, at="attn.q"),
    "stack-in": lambda: vn.IA3(at="ffn.down") >> vn.LoRA(2, at="ffn.down"),
    "stack-both": lambda: (vn.IA3(at="linear", on="input") + vn.BitFit()) >> vn.IA3(at="linear", on="output"),
    "stack-inputs": lambda: vn.IA3(at="ffn.down") >> vn.IA3(at="ffn.down"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_merged_is_the_same_and_every_bit_comes_back(kind: str, plan: str) -> None:
    if kind == "llama" and plan in ("all", "constant", "twice", "stack-both"):
        return  # no biases
    model, inputs = fresh(kind)
    before = look(model, inputs)
    base = {n: p.clone() for n, p in model.state_dict().items()}
    shake(vn.attach(model, PLANS[plan](), name="a"))
    after = look(model, inputs)
    merged = vn.merge(model)
    assert merged.names == ("a",) and merged.error == 0 and vn.active(model) == ()
    moved = float((after - before).abs().max())
    torch.testing.assert_close(look(model, inputs), after, atol=1e-2 * moved + 1e-6, rtol=0)
    assert moved > 1e-5
    with vn.disabled(model):
        assert torch.equal(look(model, inputs), before)
        with vn.disabled(model):
            assert torch.equal(look(model, inputs), before)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-4, rtol=1e-3)
    vn.unmerge(model)
    assert vn.active(model) == ("a",) and torch.equal(look(model, inputs), after)
    vn.merge(model)
    vn.detach(model, "a")
    own = model.state_dict()
    assert list(own) == list(base) and all(torch.equal(own[n], p) for n, p in base.items())
    assert torch.equal(look(model, inputs), before)


def test_stacked_is_not_beside() -> None:
    """At one map: (l (W + dW)) x for LoRA >> IA3, and (l W + dW) x for LoRA + IA3."""
    outputs = {}
    for plan in (vn.LoRA(2, at="attn.q") >> vn.IA3(at="attn.q"), vn.LoRA(2, at="attn.q") + vn.IA3(at="attn.q")):
        model = build()
        shake(vn.attach(model, plan))
        lora, ia3 = (p for p in vn.Adapter(model, "default").parts if p.site.layer == 0)
        query = model.bert.encoder.layer[0].attention.self.query
        w, b, x = query._parameters["weight"], query._parameters["bias"], torch.randn(2, 5, 32)
        d = lora.scale * lora.B @ lora.A
        want = ia3.l * (x @ (w + d).T + b) if "stack" in plan.to_dict() else ia3.l * (x @ w.T + b) + x @ d.T
        torch.testing.assert_close(query(x), want, atol=1e-5, rtol=1e-5)
        vn.merge(model)
        torch.testing.assert_close(query(x), want, atol=1e-5, rtol=1e-5)
        outputs[str(plan)] = want
    assert len(outputs) == 2


def test_stacked_input_scales_multiply() -> None:
    model = build()
    a = vn.attach(model, vn.IA3(at="ffn.down@0") >> vn.IA3(at="ffn.down@0"))
    shake(a)
    one, two = a.parts
    down = model.bert.encoder.layer[0].output.dense
    x = torch.randn(2, 5, 48)
    want = torch.nn.functional.linear(one.l * two.l * x, down._parameters["weight"], down._parameters["bias"])
    torch.testing.assert_close(down(x), want, atol=1e-5, rtol=1e-5)
    vn.merge(model)
    torch.testing.assert_close(down(x), want, atol=1e-5, rtol=1e-5)


def test_several_at_once() -> None:
    model, inputs = fresh()
    names = ["a", "aa", "a_b"]
    for i, n in enumerate(names):
        shake(vn.attach(model, [vn.LoRA(2, at="linear"), vn.IA3(), vn.BitFit() + vn.LoRA(1)][i], name=n), i)
    vn.activate(model, names)
    all_three = look(model, inputs)
    vn.activate(model, "aa")
    only = look(model, inputs)
    vn.merge(model, names)
    torch.testing.assert_close(look(model, inputs), all_three, atol=1e-4, rtol=1e-3)
    vn.unmerge(model)
    assert vn.active(model) == ("aa",) and torch.equal(look(model, inputs), only)
    vn.merge(model, "a")
    vn.detach(model, "aa")
    vn.unmerge(model)
    assert vn.active(model) == ()
    assert str(vn.summary(model)).count("(off)") >= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number(value: float) -> None:
    model, inputs = fresh()
    adapter = shake(vn.attach(model, vn.LoRA(2, at="linear") + vn.IA3(), name="a"))
    last = list(adapter.parameters())[-1]
    with torch.no_grad():
        last.reshape(-1)[-1] = value
    with refuses(vn.MergeError, "NaN or infinity in 'l'", "bert.encoder.layer.2", "base is untouched", model=model):
        vn.merge(model, "a")
    with vn.disabled(model):
        assert torch.equal(look(model, inputs), look(build(), inputs))


def test_what_cannot_be_merged() -> None:
    model = build()
    for plan, texts in (
        (vn.LoRA(2) + vn.Bottleneck(2), ["bottleneck .in 'a'. cannot be merged", "vn.methods"]),
        (vn.LoRA(2) + vn.Prefix(2), ["prefix"]),
        (vn.gated(vn.LoRA(2)), ["gates of 'a' vary", "vn.settle"]),
        (vn.gated(vn.LoRA(2), per="token"), ["gates of 'a' vary"]),
    ):
        vn.attach(model, plan, name="a")
        with refuses(vn.CapabilityError, *texts, model=model):
            vn.merge(model)
        vn.detach(model)


def test_refusals() -> None:
    model = build()
    with refuses(vn.AdapterError, "nothing is attached", "vn.attach", model=model):
        vn.merge(model)
    shake(vn.attach(model, vn.LoRA(2), name="a"))
    shake(vn.attach(model, vn.LoRA(2), name="aa", activate=False))
    with refuses(vn.MergeError, "nothing is merged", "vn.merge", model=model):
        vn.unmerge(model)
    with refuses(vn.AdapterError, "no adapter called 'ab'", "'aa' or 'a'|'a' or 'aa'", model=model):
        vn.merge(model, "ab")
    for twice in (["a", "a"], ["a", "aa", "a"]):
        with refuses(vn.AdapterError, "a name twice", "once", model=model):
            vn.merge(model, twice)
    for none in ([], ()):
        with refuses(vn.MergeError, "no active adapter", model=model):
            vn.merge(model, none)
    vn.merge(model, "a")
    for call in (lambda: vn.merge(model, "a"), lambda: vn.merge(model, "aa"), lambda: vn.merge(model)):
        with refuses(vn.MergeError, "'a'. are merged already", "vn.unmerge", model=model):
            call()
    for call in (
        lambda: vn.activate(model, "aa"),
        lambda: vn.attach(model, vn.LoRA(2), name="b"),
        lambda: vn.route(model, ["a"]).__enter__(),
        lambda: vn.gates(model, [], name="a"),
        lambda: vn.settle(model, [], name="a"),
    ):
        with refuses(vn.AdapterError, "merged into this model", "vn.unmerge", model=model):
            call()
    vn.unmerge(model)
    with refuses(vn.MergeError, "nothing is merged", model=model):
        vn.unmerge(model)


def test_half_precision_says_what_rounding_lost() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = build().to(dtype)
        adapter = vn.attach(model, vn.LoRA(2, at="linear"), name="a")
        shake(adapter, scale=0.3)
        base = {n: p.clone() for n, p in model.named_parameters() if "_veneer" not in n}
        big = vn.merge(model).error
        vn.unmerge(model)
        with torch.no_grad():
            for n, p in adapter.named_parameters():
                if n.endswith("B"):
                    p.mul_(1e-4)
        small = vn.merge(model).error
        assert 0 < big < 0.1 < small
        vn.unmerge(model)
        assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if "_veneer" not in n)


def test_overflow() -> None:
    model = build().to(torch.float16)
    adapter = shake(vn.attach(model, vn.LoRA(2, at="linear"), name="a"))
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1000)
    with refuses(vn.MergeError, "beyond the range of float16", "bf16 or fp32", model=model):
        vn.merge(model)


def test_an_error_halfway_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from veneer import merge as module  # noqa: F401

    model = build()
    shake(vn.attach(model, vn.LoRA(2, at="linear"), name="a"))
    merging = sys.modules["veneer.merge"]
    own, count = merging._rounded, [0]  # type: ignore[attr-defined]

    def fail(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise MemoryError
        return own(*args)

    monkeypatch.setattr(merging, "_rounded", fail)
    with unchanged(model), pytest.raises(MemoryError):
        vn.merge(model)
    assert vn.active(model) == ("a",)
    monkeypatch.undo()
    vn.merge(model)


def test_merged_weights_are_their_own() -> None:
    """Training the adapter on does not reach into merged weights."""
    model, inputs = fresh()
    adapter = shake(vn.attach(model, vn.Full(at="norm,head") + vn.LoRA(2), name="a"))
    vn.merge(model)
    merged = look(model, inputs)
    shake(adapter, 9)
    assert torch.equal(look(model, inputs), merged)
    own = {p.data_ptr() for p in adapter.parameters()}
    assert not own & {p.data_ptr() for n, p in model.named_parameters() if "_veneer" not in n}


def test_moved_while_merged() -> None:
    model = build()
    shake(vn.attach(model, vn.LoRA(2), name="a"))
    vn.merge(model)
    model.to(torch.bfloat16)
    vn.unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = build().to(torch.bfloat16)
    with vn.disabled(model):
        assert torch.equal(look(model, ZOO["bert"].inputs(2, 5)), look(want, ZOO["bert"].inputs(2, 5)))
