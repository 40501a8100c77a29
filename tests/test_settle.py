"""Settling: gates become constants, what is not needed goes, and what is left is an ordinary adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer as vn
from helpers import build, fresh, grads, look, loss, refuses, shake, unchanged

PLAN = vn.gated(vn.Bottleneck(4) + vn.Prefix(3) + vn.LoRA(2)) + vn.Full(at="head")


def ready(kind: str = "bert", plan: Any = PLAN, **biases: float) -> tuple[Any, dict[str, Any], vn.Adapter]:
    """A model with the plan attached and its gates' biases set for each method: which will be large."""
    model, inputs = fresh(kind)
    adapter = shake(vn.attach(model, plan, name="u"), scale=0.1)
    with torch.no_grad():
        for p in adapter.parts:
            if p.gate is not None:
                p.gate.bias.fill_(biases.get(p.method_name, 0.0))
    return model, inputs, adapter


def by_hand(model: Any, adapter: vn.Adapter, means: dict[int, float]) -> None:
    """Give each gate its mean as a constant, without settle: w = 0 and b = logit(mean)."""
    with torch.no_grad():
        for p in adapter.parts:
            if p.gate is not None:
                if hasattr(p.gate, "weight"):
                    p.gate.weight.zero_()
                p.gate.bias.fill_(p.gate.temperature * float(torch.logit(torch.tensor(means[id(p)], dtype=torch.float64))))


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("bert", PLAN),
        ("gpt2", vn.gated(vn.Bottleneck(4) + vn.Prefix(3) + vn.LoRA(2) + vn.IA3())),
        ("llama", vn.gated(vn.LoRA(2, at="linear") + vn.IA3() + vn.PromptTuning(2), per="token")),
        ("bart", vn.gated(vn.Bottleneck(4) + vn.LoRA(2) + vn.Prefix(2))),
        ("bert", vn.gated(vn.BitFit() + vn.IA3(at="linear"), temperature=2.0)),
        ("bert", vn.gated(vn.LoRA(2, at="attn.q") >> vn.IA3(at="attn.q")) + vn.LoRA(1)),
        ("bert", vn.gated(vn.Prefix(2), gate="published") + vn.gated(vn.LoRA(2), bias=1.0)),
    ],
    ids=str,
)
def test_settled_is_the_gates_at_their_means(kind: str, plan: vn.Plan, tmp_path: Path) -> None:
    model, inputs, adapter = ready(kind, plan)
    rows = vn.gates(model, [inputs]).rows
    gated = [p for p in adapter.parts if p.gate is not None]
    reference, _, twin = ready(kind, plan)
    own = dict(adapter.named_parameters())
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.copy_(own[n])
    by_hand(reference, twin, {id(p): r["mean"] for p, r in zip([p for p in twin.parts if p.gate is not None], rows, strict=True)})
    want, before = look(reference, inputs), look(build(kind), inputs)
    report = vn.settle(model, [inputs], name="u")
    got = look(model, inputs)
    moved = float((want - before).abs().max())
    torch.testing.assert_close(got, want, atol=1e-3 * moved + 2e-6, rtol=0)
    assert report.plan == adapter.plan and report.name == "u" and all(r["kept"] for r in report.parts)
    assert report.after < report.before and len(gated) == len(rows)
    kinds = {p.method_name: p.gate.per for p in adapter.parts if p.gate is not None}
    assert set(kinds) <= {"prefix", "prompt"} and set(kinds.values()) <= {"constant"}
    # the plan is one that a fresh model takes, and that files carry
    again = build(kind)
    vn.attach(again, report.plan, name="x")
    own = dict(adapter.named_parameters())
    assert {n: p.shape for n, p in vn.Adapter(again, "x").named_parameters()} == {n: p.shape for n, p in own.items()}
    with torch.no_grad():
        for n, p in vn.Adapter(again, "x").named_parameters():
            p.copy_(own[n])
    assert torch.equal(look(again, inputs), got)
    vn.save(model, tmp_path)
    loaded = build(kind)
    vn.load(loaded, tmp_path)
    assert torch.equal(look(loaded, inputs), got)
    vn.detach(model)
    assert torch.equal(look(model, inputs), before)


def test_the_largest_gates_stay() -> None:
    model, inputs, adapter = ready(bottleneck=-3.0, prefix=-2.0, lora=3.0)
    report = vn.settle(model, [inputs], keep=2)
    assert {(r["method"], r["module"]) for r in report.parts if r["kept"]} == {("lora", "attn.q"), ("lora", "attn.v")}
    assert {p.method_name for p in adapter.parts} == {"lora", "full"}
    assert report.plan == vn.LoRA(2, alpha=2) + vn.Full(at="head")
    assert not any("bottleneck" in n or "prefix" in n or "gate" in n for n, _ in adapter.named_parameters())
    assert "lora" in str(report) and "no" in str(report) and f"{report.before:,} -> {report.after:,}" in str(report)
    inside = torch.equal(look(model, inputs), (vn.merge(model), vn.unmerge(model), look(model, inputs))[2])
    assert inside
    after = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-5, rtol=1e-4)


def test_one_role_of_two() -> None:
    for kind in ("bert", "gpt2"):
        model, inputs, adapter = ready(kind, vn.gated(vn.LoRA(2)))
        with torch.no_grad():
            for p in adapter.parts:
                p.gate.bias.fill_(2.0 if p.site.role == "attn.v" else -2.0)
        report = vn.settle(model, [inputs], keep=1)
        assert report.plan == vn.LoRA(2, alpha=2, at="attn.v")
        other = build(kind)
        vn.attach(other, report.plan)
        assert [p.site for p in vn.Adapter(other, "default").parts] == [p.site for p in adapter.parts]


ALL = {"prefix", "bottleneck", "lora"}


@pytest.mark.parametrize(("keep", "methods"), [(1, {"prefix"}), (2, {"prefix", "bottleneck"}), (9, ALL), (1.0, ALL), (0.5, {"prefix", "lora"})])
def test_keep(keep: Any, methods: set[str]) -> None:
    model, inputs, adapter = ready(prefix=2.0, bottleneck=1.0, lora=-1.0)
    report = vn.settle(model, [inputs], keep=keep)
    assert {r["method"] for r in report.parts if r["kept"]} == methods
    total, left = (sum(r["parameters"] for r in report.parts if r["kept"] or every) for every in (True, False))
    if isinstance(keep, float):
        assert left <= keep * total


def test_threshold() -> None:
    model, inputs, _ = ready(prefix=2.0, bottleneck=1.0, lora=-1.0)
    report = vn.settle(model, [inputs], threshold=0.5)
    assert {r["method"] for r in report.parts if not r["kept"]} == {"lora"}
    assert all((r["mean"] >= 0.5) == r["kept"] for r in report.parts)


def test_score_decides() -> None:
    """The group whose removal costs most stays, however small its gate."""
    model, inputs, adapter = ready(prefix=2.0, bottleneck=1.0, lora=-2.0)
    vn.attach(model, vn.LoRA(1), name="other")
    calls: list[set[str]] = []

    def score(m: Any) -> float:
        assert m is model and vn.active(m) == ("u",)
        on = {(p.method_name, p.site.role) for p in adapter.parts if p.adapter == "u" and p.gate is not None}
        calls.append({f"{a} {b}" for a, b in on})
        look(m, inputs)
        return len(on) + (10.0 if ("lora", "attn.v") in on else 0.0)

    report = vn.settle(model, [inputs], keep=1, name="u", score=score)
    assert len(calls) == 5 and len(calls[0]) == 4 and all(len(c) == 3 for c in calls[1:])
    assert {(r["method"], r["module"]): r["loss"] for r in report.parts} == {
        ("bottleneck", "ffn"): 1.0, ("prefix", "attn"): 1.0, ("lora", "attn.q"): 1.0, ("lora", "attn.v"): 11.0,
    }  # fmt: skip
    assert [(r["method"], r["module"]) for r in report.parts if r["kept"]] == [("lora", "attn.v")]
    assert "+11.0000" in str(report) and vn.active(model) == ("other",)


def test_retune_trains_what_is_left() -> None:
    model, inputs, adapter = ready(lora=3.0, prefix=-3.0, bottleneck=-3.0)

    def retune(m: Any) -> None:
        assert {p.method_name for p in adapter.parts} == {"lora", "full"}
        optimiser = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        loss(m, inputs).backward()
        assert len(grads(adapter)) == len(list(adapter.parameters()))
        optimiser.step()

    plain, _, _ = ready(lora=3.0, prefix=-3.0, bottleneck=-3.0)
    vn.settle(plain, [inputs], keep=2)
    vn.settle(model, [inputs], keep=2, retune=retune)
    assert not torch.equal(look(model, inputs), look(plain, inputs))


def test_settling_what_is_settled() -> None:
    model, inputs, adapter = ready(lora=-3.0, prefix=1.0, bottleneck=2.0)
    first = vn.settle(model, [inputs], keep=2)
    before = look(model, inputs)
    second = vn.settle(model, [inputs])  # the prefix has a constant gate still
    assert second.plan == first.plan == adapter.plan and torch.allclose(look(model, inputs), before, atol=1e-6)
    other = build()
    vn.attach(other, second.plan)


@pytest.mark.parametrize(
    ("options", "error", "texts"),
    [
        ({"by": "rolle"}, vn.PlanError, ["by is 'rolle'", "'role'"]),
        ({"score": "output"}, vn.PlanError, ["score='output'", "score='outputs'"]),
        ({"keep": 0}, vn.PlanError, ["keep=0", "as 2"]),
        ({"keep": -1}, vn.PlanError, ["keep=-1"]),
        ({"keep": True}, vn.PlanError, ["keep=True"]),
        ({"keep": 1.5}, vn.PlanError, ["keep=1.5", "as 0.5"]),
        ({"keep": float("nan")}, vn.PlanError, ["keep=nan"]),
        ({"keep": "2"}, vn.PlanError, ["keep='2'"]),
        ({"keep": 1e-6}, vn.PlanError, ["nothing would be left", "at least one group", "smallest group"]),
        ({"threshold": 1.1}, vn.PlanError, ["nothing would be left", "largest mean gate is 0"]),
        ({"threshold": "x"}, vn.PlanError, ["threshold='x'"]),
        ({"name": "v"}, vn.AdapterError, ["no adapter called 'v'"]),
        ({"score": lambda m: float("nan")}, vn.PlanError, ["score of the whole adapter", "finite number"]),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[vn.VeneerError], texts: list[str]) -> None:
    model, inputs, adapter = ready()
    before, plan = look(model, inputs), adapter.plan
    with refuses(error, *texts, model=model):
        vn.settle(model, [inputs], **options)
    assert adapter.plan == plan and torch.equal(look(model, inputs), before)


def test_errors_leave_the_adapter_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["veneer.static"]

    def stop(*args: Any) -> Any:
        raise ZeroDivisionError

    def ruin(m: Any) -> None:
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p.zero_()
        raise ZeroDivisionError

    model, inputs, adapter = ready(lora=3.0, prefix=-3.0)
    before, plan, parts = look(model, inputs), adapter.plan, adapter.parts
    numbers = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    with unchanged(model):
        for options in ({"retune": ruin}, {"score": stop}):
            with pytest.raises(ZeroDivisionError):
                vn.settle(model, [inputs], keep=2, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "_static", stop)
        with pytest.raises(ZeroDivisionError):
            vn.settle(model, [inputs], keep=2)
        monkeypatch.undo()
        with pytest.raises((TypeError, ValueError)):
            vn.settle(model, [{"nonsense": 1}])
        with refuses(vn.CapabilityError, "no batches"):
            vn.settle(model, [])
    assert adapter.plan == plan and adapter.parts == parts and torch.equal(look(model, inputs), before)
    assert all(torch.equal(p, numbers[n]) for n, p in adapter.named_parameters())
    vn.settle(model, [inputs], keep=2)


def test_no_gates_and_gates_that_nothing_reaches() -> None:
    model, inputs = fresh()
    vn.attach(model, vn.LoRA(2), name="plain")
    with refuses(vn.CapabilityError, "no active adapter has gates", model=model):
        vn.settle(model, [inputs])
    model, inputs, adapter = ready("bart", vn.gated(vn.LoRA(2)))
    with torch.no_grad():
        next(p for p in adapter.parts).gate.bias.fill_(float("nan"))
    with refuses(vn.CapabilityError, "lora: the gate is not a number", "layers.0.self_attn", model=model):
        vn.settle(model, [inputs])


def test_no_random_numbers_are_drawn() -> None:
    model, inputs, _ = ready()
    dice = torch.random.get_rng_state()
    vn.settle(model, [inputs], keep=2)
    assert torch.equal(dice, torch.random.get_rng_state())


def test_a_latency_of_nothing_keeps_what_merges() -> None:
    model, inputs, adapter = ready(prefix=3.0, bottleneck=2.0, lora=-2.0)
    report = vn.settle(model, [inputs], keep="latency:+0%")
    assert {r["method"] for r in report.parts if r["merges"]} == {r["method"] for r in report.parts if r["kept"]} == {"lora"}
    assert report.latency == 0.0 and report.plan == vn.LoRA(2, alpha=2) + vn.Full(at="head")
    after = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-5, rtol=1e-4)


def test_a_latency_is_measured_and_limits_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Best first: the prefix is taken while the time allows it, the bottleneck no more, and what merges is free."""
    asked: list[set[str]] = []

    def clock(model: Any, state: Any, record: Any, on: list[Any], means: Any, batch: Any) -> float:
        asked.append({p.method_name for p in on})
        return 0.06 * len(asked[-1])

    model, inputs, _ = ready(prefix=3.0, bottleneck=2.0, lora=-2.0)
    monkeypatch.setattr(sys.modules["veneer.settle"], "added", clock)  # vn.settle is the function
    report = vn.settle(model, [inputs], keep={"latency": "+10%", "parts": 3})
    assert asked == [{"prefix"}, {"prefix", "bottleneck"}] and report.latency == pytest.approx(0.06)
    assert sorted(r["method"] for r in report.parts if r["kept"]) == ["lora", "prefix"]
    assert "+6.0% latency" in str(report)


def test_a_measured_latency_is_of_the_real_call() -> None:
    model, inputs, adapter = ready(prefix=3.0, bottleneck=2.0, lora=-2.0)
    gates, active, training = [p.gate for p in adapter.parts], vn.active(model), model.training
    report = vn.settle(model, [inputs], keep={"latency": 1000.0})
    assert report.latency is not None and 0 <= report.latency < 1000 and all(r["kept"] for r in report.parts)
    assert vn.active(model) == active and model.training == training and len(gates) == len(adapter.parts)


def test_the_spread_of_a_loss_and_the_saved_report(tmp_path: Path) -> None:
    model, inputs, adapter = ready(bottleneck=1.0)

    def score(m: Any) -> list[float]:
        look(m, inputs)
        on = {p.method_name for p in adapter.parts if p.adapter == "u" and p.gate is not None}
        return [float("lora" in on), 2.0 * ("lora" in on), 3.0]

    report = vn.settle(model, [inputs], keep={"share": 0.9}, score=score)
    for r in report.parts:
        assert (r["loss"], r["loss_std"]) == (0.0, 0.0) or r["method"] != "lora"
    saved = json.loads(report.save(tmp_path / "report.json").read_text())
    assert vn.Plan.from_dict(saved["plan"]) == report.plan and saved["parts"] == json.loads(json.dumps(report.parts))
    # without one whole method the paired differences are 1, 2 and 0
    model, inputs, adapter = ready(plan=vn.gated(vn.LoRA(2, at="attn.q") + vn.Prefix(2)))
    report = vn.settle(model, [inputs], score=score)
    lora = next(r for r in report.parts if r["method"] == "lora")
    assert lora["loss"] == pytest.approx(1.0) and lora["loss_std"] == pytest.approx(1 / 3**0.5) and "±0.5774" in str(report)


def test_by_layer_the_best_for_its_size_stays() -> None:
    model, inputs, adapter = ready(plan=vn.gated(vn.Bottleneck(8) + vn.paced(vn.LoRA(1), 3.0)) + vn.Full(at="head"))
    gated = [p for p in adapter.parts if p.gate is not None]
    worth = {("bottleneck", 1): 3.0, ("lora", 0): 2.5, ("lora", 2): 1.0}

    def score(m: Any) -> float:
        return sum(worth.get((p.method_name, p.site.layer), 0.0) for p in gated if p.adapter == "u" and p.site.role != "attn.q")

    report = vn.settle(model, [inputs], keep=0.3, by="layer", score=score)
    assert len(report.parts) == len(gated) == 9 and all(len(r["layers"]) == 1 for r in report.parts)
    kept = {(r["method"], r["module"], r["layers"][0]) for r in report.parts if r["kept"]}
    # a bottleneck is worth 3 and takes nearly the whole limit; two of LoRA are worth more together
    assert {("lora", "attn.v", 0), ("lora", "attn.v", 2)} <= kept
    assert sum(r["parameters"] for r in report.parts if r["kept"]) <= 0.3 * sum(r["parameters"] for r in report.parts)
    assert "attn.v@2" in str(report) and {p.pace for p in adapter.parts if p.method_name == "lora"} == {3.0}
    other = build()
    assert [p.site for p in vn.attach(other, report.plan, name="again").parts] == [p.site for p in adapter.parts]


def test_a_score_of_the_outputs_needs_no_labels() -> None:
    def made() -> tuple[Any, dict[str, Any], vn.Adapter]:
        torch.manual_seed(0)
        model, inputs, adapter = ready(plan=vn.gated(vn.LoRA(2) + vn.IA3() + vn.Prefix(2)), ia3=5.0)
        with torch.no_grad():
            for p in adapter.parts:  # an (IA)3 that does nothing, under wide gates
                if p.method_name == "ia3":
                    p.l.fill_(1.0)
        return model, inputs, adapter

    model, inputs, adapter = made()
    whole = look(model, inputs)
    with vn.disabled(model):
        bare = look(model, inputs)
    with torch.no_grad():
        for p in adapter.parts:
            if p.site.role == "attn.v":
                p.gate.weight.zero_()
                p.gate.bias.fill_(-60.0)
    far = float((look(model, inputs) - whole).double().square().sum() / (bare - whole).double().square().sum())
    report = vn.settle(made()[0], [inputs], keep=2, score="outputs")
    loss = {(r["method"], r["module"]): r["loss"] for r in report.parts}
    assert loss["lora", "attn.v"] == pytest.approx(far, rel=1e-3) and far > 0
    assert all(v == pytest.approx(0.0, abs=1e-9) for (m, _), v in loss.items() if m == "ia3")
    assert all(r["method"] != "ia3" for r in report.parts if r["kept"])


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ("latency:fast", "a latency of 'fast'.*\\+0%"),
        ("latenzy:+0%", "keep has no 'latenzy'.*latency"),
        ({"latency": -0.1}, "a latency of -0.1"),
        ({"parts": 0}, "keep=0"),
        ({"share": 2}, "keep=2"),
        ({}, "keep=\\{\\}"),
    ],
    ids=str,
)
def test_limits_that_cannot_be_read(keep: Any, text: str) -> None:
    model, inputs, _ = ready()
    with refuses(vn.PlanError, text, model=model):
        vn.settle(model, [inputs], keep=keep)


def test_a_latency_that_nothing_meets_says_what_the_cheapest_needs() -> None:
    model, inputs, _ = ready(plan=vn.gated(vn.Prefix(2) + vn.Bottleneck(2)))
    with refuses(vn.PlanError, "nothing would be left", r"least latency that was measured is \+\d+%", model=model):
        vn.settle(model, [inputs], keep="latency:+0%")
