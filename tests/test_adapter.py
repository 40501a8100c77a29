"""Named adapters: which are in force, alone, together, row by row, and never more than one was told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import veneer as vn
from helpers import MIXED, build, fresh, grads, look, loss, output, refuses, shake, unchanged
from zoo import ZOO

NAMES = ("a", "aa", "a_b")


def three(kind: str = "bert", plan: Any = None) -> tuple[Any, dict[str, Any], dict[str, vn.Adapter]]:
    model, inputs = fresh(kind, 4)
    plans = [plan] * 3 if plan is not None else [MIXED, vn.LoRA(2, at="linear") + vn.Prefix(3), vn.gated(vn.Bottleneck(3) + vn.IA3())]
    return model, inputs, {n: shake(vn.attach(model, p, name=n), i) for i, (n, p) in enumerate(zip(NAMES, plans, strict=True))}


# -- active -----------------------------------------------------------------------------------------------------------
def test_the_last_attached_is_active_alone() -> None:
    model, _, _ = three()
    assert vn.active(model) == ("a_b",)
    vn.attach(model, vn.LoRA(1), name="b", activate=False)
    assert vn.active(model) == ("a_b",)


def test_each_is_itself_whatever_else_is_attached() -> None:
    model, inputs, _ = three()
    base = look(build(), inputs)
    for i, n in enumerate(NAMES):
        vn.activate(model, n)
        alone = build()
        plans = [MIXED, vn.LoRA(2, at="linear") + vn.Prefix(3), vn.gated(vn.Bottleneck(3) + vn.IA3())]
        vn.attach(alone, plans[i], name="x")
        own = dict(vn.Adapter(model, n).named_parameters())
        with torch.no_grad():
            for k, p in vn.Adapter(alone, "x").named_parameters():
                p.copy_(own[k])
        assert torch.equal(look(model, inputs), look(alone, inputs)), n
    vn.activate(model, None)
    assert vn.active(model) == () and torch.equal(look(model, inputs), base)
    vn.activate(model, [])
    assert torch.equal(look(model, inputs), base)


def test_several_add_in_any_order() -> None:
    model, inputs, _ = three()
    vn.activate(model, NAMES)
    together = look(model, inputs)
    for order in (("a_b", "a", "aa"), ("aa", "a_b", "a")):
        vn.activate(model, order)
        torch.testing.assert_close(look(model, inputs), together, atol=1e-5, rtol=1e-5)
    one = build()
    for n in reversed(NAMES):  # attached in another order, too
        vn.attach(one, vn.Adapter(model, n).plan, name=n)
        own = dict(vn.Adapter(model, n).named_parameters())
        with torch.no_grad():
            for k, p in vn.Adapter(one, n).named_parameters():
                p.copy_(own[k])
    vn.activate(one, NAMES)
    torch.testing.assert_close(look(one, inputs), together, atol=1e-5, rtol=1e-5)


def test_deviations_add_at_a_map() -> None:
    model = build()
    query = model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        base, alone = query(x), {}
        for i, n in enumerate(NAMES):
            shake(vn.attach(model, [vn.LoRA(2), vn.LoRA(3), vn.IA3(at="attn.q")][i], name=n), i)
            alone[n] = query(x) - base
        vn.activate(model, NAMES)
        torch.testing.assert_close(query(x) - base, sum(alone.values()), atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    model = build()
    for call in (
        lambda: vn.activate(model, None),
        lambda: vn.active(model),
        lambda: vn.disabled(model).__enter__(),
        lambda: vn.route(model, [None]).__enter__(),
        lambda: vn.detach(model),
        lambda: vn.detach(model, "a"),
        lambda: vn.summary(model),
        lambda: vn.gates(model, []),
        lambda: vn.settle(model, []),
        lambda: vn.save(model, "/nowhere"),
        lambda: vn.merge(model),
        lambda: vn.unmerge(model),
    ):
        with refuses(vn.AdapterError, "nothing is attached to this model", "vn.attach", model=model):
            call()
    model, _, _ = three()
    for call in (
        lambda: vn.activate(model, "ab"),
        lambda: vn.activate(model, ["a", "ab"]),
        lambda: vn.route(model, ["ab", None]).__enter__(),
        lambda: vn.detach(model, "ab"),
        lambda: vn.merge(model, "ab"),
        lambda: vn.save(model, "/nowhere", name="ab"),
        lambda: vn.gates(model, [], name="ab"),
        lambda: vn.Adapter(model, "ab").plan,
    ):
        with refuses(vn.AdapterError, "no adapter called 'ab' is attached", "Did you mean 'a.*'", model=model):
            call()
    for bad in (3, [3], [["a"]], {"x": 1}, [None], 2.5, object()):
        with refuses(vn.AdapterError, "no adapter called", model=model):
            vn.activate(model, bad)  # type: ignore[arg-type]
    with refuses(vn.AdapterError, "a name twice in .'a', 'aa', 'a'", "once", model=model):
        vn.activate(model, ["a", "aa", "a"])
    assert vn.active(model) == ("a_b",)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a.b", "a/b", "a\\b", "a:b", "a\nb", "a\x00", None, 3, ["a"], b"a", "x" * 101, "\ud800"])
def test_bad_names(name: Any) -> None:
    model = build()
    with refuses(vn.AdapterError, "an adapter's name is a word without", "'sst2'", model=model):
        vn.attach(model, vn.LoRA(2), name=name)


@pytest.mark.parametrize("name", ["a b", "Ünïcödé", "@a", "_veneer", "weight", "0", "a-b_c", "default"])
def test_good_names(name: str, tmp_path: Any) -> None:
    model, inputs = fresh()
    before = look(model, inputs)
    shake(vn.attach(model, vn.LoRA(2), name=name))
    after = look(model, inputs)
    vn.save(model, tmp_path)
    vn.detach(model, name)
    assert torch.equal(look(model, inputs), before)
    assert vn.load(model, tmp_path).name == name and torch.equal(look(model, inputs), after)


def test_attaching_again() -> None:
    model = build()
    vn.attach(model, vn.LoRA(2), name="a")
    with refuses(vn.AdapterError, "'a' is attached already", "another name", model=model):
        vn.attach(model, vn.IA3(), name="a")
    with refuses(vn.AdapterError, "to a torch module, not to 'bert'"):
        vn.attach("bert", vn.LoRA(2))  # type: ignore[arg-type]
    whole = build()
    vn.attach(whole.bert, vn.LoRA(2, at="attn.q"))
    with refuses(vn.AdapterError, "a part of this model has adapters", "bert", model=whole):
        vn.attach(whole, vn.LoRA(2))


def test_a_failing_attach_leaves_the_others() -> None:
    model, inputs, _ = three()
    before = look(model, inputs)
    for plan in (vn.LoRA(2) + vn.LoRA(33), vn.LoRA(2, at="nope"), vn.BitFit() + vn.Bottleneck(10**6)):
        with refuses((vn.PlanError, vn.SiteError), model=model):  # type: ignore[arg-type]
            vn.attach(model, plan, name="x")
    assert vn.active(model) == ("a_b",) and torch.equal(look(model, inputs), before)


# -- off --------------------------------------------------------------------------------------------------------------
def test_disabled_nests_and_survives_exceptions() -> None:
    model, inputs, _ = three()
    base, on = look(build(), inputs), look(model, inputs)
    with vn.disabled(model) as same:
        assert same is model
        with vn.disabled(model):
            assert torch.equal(look(model, inputs), base)
        assert torch.equal(look(model, inputs), base)
        with pytest.raises(ZeroDivisionError), vn.disabled(model):
            raise ZeroDivisionError
        assert torch.equal(look(model, inputs), base)
        vn.activate(model, "a")
        assert torch.equal(look(model, inputs), base)
        vn.activate(model, "a_b")
    assert torch.equal(look(model, inputs), on)
    vn.activate(model, "a")
    vn.activate(model, "a_b")
    with pytest.raises(ZeroDivisionError), vn.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(look(model, inputs), on)


def test_detaching_the_active_one_and_the_rest() -> None:
    model, inputs, handles = three()
    before = build()
    vn.activate(model, ["a", "aa"])
    vn.detach(model, "a")
    assert vn.active(model) == ("aa",) and set(vn.summary(model).active) == {"aa"}
    assert repr(handles["a"]) == "Adapter('a', detached)" and "4 parts" not in repr(handles["aa"])
    with refuses(vn.AdapterError, "no adapter called 'a'", "'aa'|'a_b'"):
        handles["a"].plan  # noqa: B018
    vn.detach(model, "aa")
    assert vn.active(model) == () and torch.equal(look(model, inputs), look(before, inputs))
    vn.detach(model, "a_b")
    for (n, p), (m, q) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q) and p.requires_grad == q.requires_grad
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert repr(handles["aa"]) == "Adapter('aa', detached)"


def test_attach_and_detach_many_times() -> None:
    model, inputs = fresh()
    model.bert.embeddings.requires_grad_(False)
    with unchanged(model):
        for _ in range(3):
            vn.attach(model, MIXED, name="a")
            vn.attach(model, "unipelt-apl", name="b")
            vn.attach(model, vn.PromptTuning(2), name="c")
            with vn.route(model, ["a", "b", None]):
                look(model, inputs)
            vn.detach(model)


def test_a_copy_is_independent() -> None:
    model, inputs, _ = three()
    on = look(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(look(twin, inputs), on)
    shake(vn.Adapter(twin, "a_b"), 3)
    assert torch.equal(look(model, inputs), on) and not torch.equal(look(twin, inputs), on)
    vn.detach(twin)
    assert torch.equal(look(twin, inputs), look(build(), inputs)) and torch.equal(look(model, inputs), on)


# -- rows -------------------------------------------------------------------------------------------------------------
ROUTES = [["a", "aa", "a_b", None], ["aa", "aa", "a", "a"], [["a", "aa"], [], ("a_b",), ["a_b", "a", "aa"]], [None] * 4, ["a"] * 4]


@pytest.mark.parametrize("rows", ROUTES, ids=str)
def test_rows_are_each_adapter_alone(rows: list[Any]) -> None:
    model, inputs, _ = three()
    on = look(model, inputs)
    with vn.route(model, rows):
        mixed = look(model, inputs)
        with vn.disabled(model):
            assert torch.equal(look(model, inputs), look(build(), inputs))
        with vn.route(model, list(reversed(rows))):
            look(model, inputs)
        assert torch.equal(look(model, inputs), mixed)
    assert torch.equal(look(model, inputs), on)
    for i, names in enumerate(rows):
        vn.activate(model, names)
        torch.testing.assert_close(mixed[i], look(model, inputs)[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradients_come_from_ones_own_rows(kind: str, checkpointing: bool) -> None:
    plan = vn.LoRA(2, at="linear") + vn.IA3() + vn.Prefix(2) + vn.gated(vn.Bottleneck(3, activation="tanh"))
    plan = plan + vn.Full(at="norm")
    model, inputs, handles = three(kind, plan)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = ["a", "aa", "a", None]

    def total(y: torch.Tensor, mine: list[int]) -> torch.Tensor:
        return (y.float() ** 2 * torch.linspace(0.5, 1.5, y.shape[-1])).flatten(1).sum(1)[mine].sum()

    with vn.route(model, rows):
        total(output(model, inputs), [0, 1, 2, 3]).backward()
    routed = {n: grads(h) for n, h in handles.items()}
    assert all(float(g.abs().sum()) == 0 for g in routed["a_b"].values())
    for n in ("a", "aa"):
        model.zero_grad()
        vn.activate(model, n)
        mine = [i for i, r in enumerate(rows) if r == n]
        total(output(model, {k: v[mine] for k, v in inputs.items()}), list(range(len(mine)))).backward()
        alone = grads(handles[n])
        assert set(alone) == set(routed[n]) and alone
        for k, g in alone.items():
            torch.testing.assert_close(routed[n][k], g, atol=1e-4, rtol=1e-3, msg=lambda m, k=k: f"{k}: {m}")
    assert all(p.grad is None for n, p in model.named_parameters() if "_veneer" not in n)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_rows_in_generate(kind: str, options: dict[str, Any]) -> None:
    model, inputs, _ = three(kind, vn.LoRA(2, at="linear") + vn.Prefix(2) + vn.Bottleneck(3))
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, **options}
    rows = ["a", None, "aa", "a_b"]
    with vn.route(model, rows):
        mixed = model.generate(**inputs, **options)
    each = options.get("num_return_sequences", 1)
    for i, n in enumerate(rows):
        vn.activate(model, n)
        want = model.generate(**inputs, **options)
        assert torch.equal(mixed[i * each : (i + 1) * each], want[i * each : (i + 1) * each]), (i, n)


def test_routes_that_cannot_be() -> None:
    model, inputs, _ = three()
    for rows in ([], "a", None, 3, {"a": 1}):
        with refuses(vn.AdapterError, "a list with a name", r"\['sst2', None\]", model=model):
            vn.route(model, rows).__enter__()  # type: ignore[arg-type]
    with refuses(vn.AdapterError, "a name twice"):
        vn.route(model, [["a", "a"], None, None, None]).__enter__()
    on = look(model, inputs)
    for rows in (["a"] * 3, ["a"] * 5, ["a", None, "aa"], [None, "a_b"] * 4):
        with refuses(vn.AdapterError, f"names {len(rows)} rows and the batch has 4", "for each row"), vn.route(model, rows):
            look(model, inputs)
    assert torch.equal(look(model, inputs), on)

    class Fixed(vn.LoRA):
        name, routable = "fixed", False

    vn.attach(model, Fixed(2), name="f")
    with refuses(vn.CapabilityError, "fixed .in 'f'. cannot be routed", model=model):
        vn.route(model, ["a", "f", None, None]).__enter__()
    with pytest.raises(ZeroDivisionError), vn.route(model, ["a", "aa", None, None]):
        raise ZeroDivisionError
    vn.activate(model, "a_b")
    assert torch.equal(look(model, inputs), on)


def test_handles() -> None:
    model, inputs, handles = three()
    a = handles["aa"]
    assert a.num_parameters == sum(p.numel() for p in a.parameters()) and f"{a.num_parameters:,} parameters" in repr(a)
    assert a.plan == vn.LoRA(2, at="linear") + vn.Prefix(3)
    names = [n for n, _ in a.named_parameters()]
    assert len(set(names)) == len(names) and all(":lora.0." in n or ":prefix.0." in n for n in names)
    assert {id(p) for p in a.parameters()} <= {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_veneer" not in n)
    loss(model, inputs).backward()
    assert not grads(a) and grads(handles["a_b"])
    assert ZOO["bert"].ports
