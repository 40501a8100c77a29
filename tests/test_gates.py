"""Gates: what they measure is each example's own, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import veneer as vn
from helpers import build, fresh, look, refuses, shake, unchanged
from zoo import ZOO, output

UNIPELT = [{"method": "bottleneck", "size": 4}, {"method": "prefix", "length": 3}, {"method": "lora", "r": 2}]


def gated(kind: str = "bert", **options: Any) -> tuple[Any, vn.Adapter]:
    model = build(kind)
    adapter = vn.attach(model, {"gated": UNIPELT, **options}, name="g")
    with torch.no_grad():
        for n, p in adapter.named_parameters():  # gates that differ between tokens
            if "gate.weight" in n:
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(len(n)))
    return model, shake(adapter, scale=0.05)


def means(model: Any, batch: dict[str, Any]) -> dict[Any, float]:
    return {(r["method"], r["path"]): r["mean"] for r in vn.gates(model, [batch]).rows}


def padded(ids: list[list[int]], left: bool) -> dict[str, Any]:
    longest = max(map(len, ids))
    rows = [[1] * (longest - len(r)) + r if left else r + [1] * (longest - len(r)) for r in ids]
    mask = [[0] * (longest - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (longest - len(r)) for r in ids]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    if left:  # as generate gives them: a prefix lies at no position, so a query's own must not depend on the padding
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


@pytest.mark.parametrize("per", ["example", "token"])
@pytest.mark.parametrize(("kind", "left"), [("bert", False), ("llama", False), ("llama", True)])
def test_padding_does_not_count(kind: str, left: bool, per: str) -> None:
    model, _ = gated(kind, per=per)
    short, long = [7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18]
    alone = [means(model, padded([r], left)) for r in (short, long)]
    together = means(model, padded([short, long], left))
    more = means(model, padded([short, long * 2], left))
    assert set(together) == set(alone[0])
    for key, mean in together.items():
        assert mean == pytest.approx((alone[0][key] + alone[1][key]) / 2, abs=2e-5), key
    assert max(abs(alone[0][k] - alone[1][k]) for k in together) > 1e-2, "these two examples have gates of their own"
    other = means(model, padded([long * 2], left))
    for key, mean in more.items():
        assert mean == pytest.approx((alone[0][key] + other[key]) / 2, abs=2e-5), key
    with torch.no_grad():
        one = output(model, padded([short], left))[0]
        both = output(model, padded([short, long], left))[0]
    if kind == "llama":
        both = both[-3:] if left else both[:3]
    torch.testing.assert_close(one, both, atol=1e-5, rtol=1e-4)


def test_the_mean_is_the_mean() -> None:
    """The report's number, from the equation."""
    model, adapter = gated()
    batch = padded([[7, 8, 9], [11, 12, 13, 14, 15]], False)
    part = next(p for p in adapter.parts if p.method_name == "lora" and p.site.layer == 0)
    seen: list[torch.Tensor] = []
    handle = model.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    got = next(r for r in vn.gates(model, [batch]).rows if r["path"] == part.site.path and r["method"] == "lora")
    handle.remove()
    g = torch.sigmoid(seen[0] @ part.gate.weight + part.gate.bias).detach()
    each = torch.stack([g[0, :3].mean(), g[1].mean()])
    assert got["mean"] == pytest.approx(float(each.mean()), abs=1e-6) and got["std"] == pytest.approx(float(each.std(unbiased=False)), abs=1e-6)
    assert got["n"] == 2 and (got["layer"], got["module"], got["tower"]) == (0, part.site.role, part.site.tower)


def test_constant_gates() -> None:
    model, adapter = gated(per="constant", bias=1.5, temperature=2.0)
    biases = {p.site.path: float(p.gate.bias.detach()) for p in adapter.parts if p.method_name == "lora"}
    for r in vn.gates(model, [padded([[7, 8]], False)] * 2).rows:
        if r["method"] == "lora":
            want = float(torch.sigmoid(torch.tensor(biases[r["path"]] / 2)))
            assert r["mean"] == pytest.approx(want, abs=1e-6) and r["std"] == pytest.approx(0, abs=1e-6)


def test_batches_of_every_form_and_report() -> None:
    model, _ = gated()
    batch = padded([[7, 8, 9], [11, 12]], False)
    one = vn.gates(model, [batch], name="g")
    assert [r["mean"] for r in vn.gates(model, [(batch["input_ids"], batch["attention_mask"])]).rows] == [r["mean"] for r in one.rows]
    assert {r["n"] for r in vn.gates(model, [batch] * 3).rows} == {6}
    assert set(one.by_method()) == {"bottleneck", "prefix", "lora"} and all(0 < g < 1 for g in one.by_method().values())
    lines = str(one).splitlines()
    assert len(lines) == 4 and "lora attn.q" in lines[0] and "bottleneck ffn" in lines[0] and lines[1].startswith("encoder 0")
    assert repr(one) == str(one)


def test_measuring_changes_nothing() -> None:
    model, _ = gated()
    vn.attach(model, vn.LoRA(2), name="other")
    model.train()
    model.bert.embeddings.eval()
    batch = padded([[7, 8, 9]], False)
    with unchanged(model):
        vn.gates(model, [batch], name="g")
        with pytest.raises((TypeError, ValueError)):
            vn.gates(model, [batch, {"nonsense": 1}], name="g")
        with vn.disabled(model):
            inside = means_of(vn.gates(model, [batch], name="g"))
    assert vn.active(model) == ("other",) and all(p.gate is None or p.gate.watch is None for p in vn.Adapter(model, "g").parts)
    assert inside == means_of(vn.gates(model, [batch], name="g")), "also while the adapters are off"


def means_of(report: Any) -> list[float]:
    return [r["mean"] for r in report.rows]


def test_refusals() -> None:
    model, inputs = fresh()
    vn.attach(model, vn.LoRA(2), name="plain")
    with refuses(vn.CapabilityError, "no active adapter has gates", r"vn\.gated", model=model):
        vn.gates(model, [inputs])
    with refuses(vn.CapabilityError, "'plain' has no gates", r"vn\.gated", model=model):
        vn.gates(model, [inputs], name="plain")
    vn.attach(model, vn.gated(vn.LoRA(2)), name="g")
    with refuses(vn.CapabilityError, "no batches", model=model):
        vn.gates(model, [])
    with refuses(vn.AdapterError, "no adapter called 'gg'", "Did you mean 'g'", model=model):
        vn.gates(model, [inputs], name="gg")


def test_a_gate_starts_at_a_half_and_saturates_at_off_and_on() -> None:
    plan = vn.Bottleneck(4) + vn.LoRA(2, alpha=2) + vn.Prefix(3)
    model, inputs = fresh()
    assert all(g == pytest.approx(0.5) for g in (shake(vn.attach(model, vn.gated(vn.LoRA(2))), scale=0), vn.gates(model, [inputs]).by_method())[1].values())
    vn.detach(model)
    base = look(model, inputs)
    numbers: Any = None
    for bias, wanted in ((-60.0, base), (60.0, None)):
        adapter = shake(vn.attach(model, vn.gated(plan, per="constant", bias=bias), name="g"), scale=0)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for n, p in adapter.named_parameters():
                if "gate" not in n:
                    p.copy_(torch.randn(p.shape, generator=g) * 0.2)
        numbers = {n: p.detach().clone() for n, p in adapter.named_parameters() if "gate" not in n}
        if wanted is not None:
            torch.testing.assert_close(look(model, inputs), wanted, atol=1e-6, rtol=1e-6)
        else:
            on = look(model, inputs)
        vn.detach(model)
    adapter = vn.attach(model, plan, name="ungated")
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            p.copy_(numbers[n])
    torch.testing.assert_close(look(model, inputs), on, atol=1e-6, rtol=1e-5)
    assert ZOO["bert"].ports


@pytest.mark.parametrize("per", ["example", "token", "constant"])
def test_dropped_gates_are_whole_examples_and_right_on_average(per: str) -> None:
    model, adapter = gated("bert", per=per, drop=0.3)
    gate = next(p.gate for p in adapter.parts if p.gate is not None)
    x = torch.randn(4000, 5, gate.width, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        whole = gate.eval()(x, None)
        found = torch.stack([gate.train()(x, None) for _ in range(600 if per == "constant" else 1)])
    zero = found == 0
    assert float(zero.float().mean()) == pytest.approx(0.3, abs=0.05)
    if per == "token":
        assert bool((zero.all(-1) == zero.any(-1)).all()), "an example loses the part at all of its tokens"
    torch.testing.assert_close(found[~zero], (whole.expand_as(found) / 0.7)[~zero])
    assert gate.eval().dropped(whole) is whole
