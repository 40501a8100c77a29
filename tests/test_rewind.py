"""Settling with rewind=True: what is kept starts anew, as attaching its plan would start it, and is trained alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import veneer as vn
from helpers import build, fresh, look, loss, refuses, shake, unchanged
from veneer.data.builtin import model_path, table

PLAN = vn.gated(vn.Bottleneck(4) + vn.Prefix(3) + vn.LoRA(2)) + vn.Full(at="head")
LEFT = vn.Prefix(3) + vn.LoRA(2, alpha=2) + vn.Full(at="head")


def ready(plan: Any = PLAN, kind: str = "bert", **biases: float) -> tuple[Any, dict[str, Any], vn.Adapter]:
    """A model with a plan whose numbers have moved from their start, and gates of each method as wide as its bias says."""
    model, inputs = fresh(kind)
    adapter = shake(vn.attach(model, plan, name="u"), scale=0.1)
    with torch.no_grad():
        for p in adapter.parts:
            if p.gate is not None:
                p.gate.bias.fill_(biases.get(p.method_name, 0.0))
    return model, inputs, adapter


def train(inputs: dict[str, Any], steps: int = 3) -> Any:
    def run(model: Any) -> None:
        optimizer = vn.adamw(model, lr=0.02)
        for _ in range(steps):
            loss(model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def numbers(adapter: vn.Adapter) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapter.named_parameters()}


@pytest.mark.parametrize("seed", [0, 7])
def test_it_is_the_plan_trained_anew(seed: int, tmp_path: Path) -> None:
    model, inputs, adapter = ready(bottleneck=-3.0)
    dice = torch.random.get_rng_state()
    report = vn.settle(model, [inputs], keep=3, retune=train(inputs), rewind=True, seed=seed)
    assert torch.equal(dice, torch.random.get_rng_state())
    assert report.plan == adapter.plan == LEFT and all(p.gate is None for p in adapter.parts)
    other = build()
    torch.manual_seed(seed)
    vn.attach(other, report.plan, name="u")
    train(inputs)(other)
    want, got = numbers(vn.Adapter(other, "u")), numbers(adapter)
    assert list(want) == list(got) and all(torch.equal(got[n], w) for n, w in want.items())
    after = look(model, inputs)
    assert torch.equal(after, look(other, inputs))
    assert (report.rewound, report.steps, report.scored, report.after) == (seed, 3, 0, sum(p.numel() for p in want.values()))
    assert f"started anew (seed {seed}), retuned for 3 steps" in str(report)
    assert json.loads(report.save(tmp_path / "report.json").read_text())["rewound"] == seed
    vn.save(model, tmp_path / "adapter")
    loaded = build()
    vn.load(loaded, tmp_path / "adapter")
    assert torch.equal(look(loaded, inputs), after)
    bare = look(build(), inputs)
    vn.detach(model)
    assert torch.equal(look(model, inputs), bare)


def test_folding_says_so_too() -> None:
    model, inputs, _ = ready(bottleneck=-3.0)
    report = vn.settle(model, [inputs], keep=2, score="outputs", retune=train(inputs, 2))
    assert (report.rewound, report.steps, report.scored) == (None, 2, 5) and "folded" in str(report) and "ran 5 times" in str(report)
    model, inputs, _ = ready()
    assert vn.settle(model, [inputs]).steps is None
    model, inputs, _ = ready()
    assert vn.settle(model, [inputs], retune=lambda m: 12, rewind=True).steps == 12  # a count of its own is believed


def test_what_is_left_merges_where_its_methods_do() -> None:
    model, inputs, _ = ready(lora=3.0)
    vn.settle(model, [inputs], keep="latency:+0%", retune=train(inputs), rewind=True)
    after = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-5, rtol=1e-4)


def test_after_an_error_the_gated_adapter_is_as_before() -> None:
    def ruin(m: Any) -> None:
        train(inputs)(m)
        raise ZeroDivisionError

    model, inputs, adapter = ready(lora=3.0)
    vn.attach(model, vn.LoRA(1), name="other", activate=False)
    before, plan, parts, was = look(model, inputs), adapter.plan, adapter.parts, numbers(adapter)
    with unchanged(model):
        with pytest.raises(ZeroDivisionError):
            vn.settle(model, [inputs], keep=2, retune=ruin, rewind=True)
        for options, texts in (
            ({"rewind": True}, ["nothing would train it", "retune="]),
            ({"rewind": 3, "retune": ruin}, ["rewind=3", "rewind=True"]),
            ({"rewind": True, "retune": ruin, "seed": -1}, ["seed=-1"]),
            ({"rewind": True, "retune": ruin, "seed": True}, ["seed=True"]),
        ):
            with refuses(vn.PlanError, *texts):
                vn.settle(model, [inputs], **options)  # type: ignore[arg-type]
    assert adapter.plan == plan and adapter.parts == parts and torch.equal(look(model, inputs), before)
    assert all(torch.equal(p, was[n]) for n, p in adapter.named_parameters())
    loss(model, inputs).backward()  # and it trains on
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter.parameters())


def test_what_is_held_keeps_its_numbers() -> None:
    """A frozen part under a gate cannot be trained again: its mean gate is folded, while the rest starts anew."""
    model, inputs = fresh()
    shake(vn.attach(model, vn.LoRA(2, at="attn.v"), name="old"))
    adapter = vn.attach(model, vn.gated(vn.use("old") + vn.LoRA(3, at="attn.q")), name="u")
    shake(adapter, scale=0.1)
    old = next(p for p in adapter.parts if p.held)
    product = old.gate, {n: p.detach().clone() for n, p in old.named_parameters() if not n.startswith("gate.")}
    mean = next(r["mean"] for p, r in zip(adapter.parts, vn.gates(model, [inputs], name="u").rows, strict=True) if p is old)
    vn.settle(model, [inputs], name="u", retune=lambda m: None, rewind=True)
    kept = next(p for p in adapter.parts if p.held)
    assert kept is old and product[0] is not None and kept.gate is None
    now = {n: p.detach() for n, p in kept.named_parameters()}
    changed = [n for n, p in product[1].items() if not torch.equal(p, now[n])]
    assert len(changed) == 1 and torch.allclose(now[changed[0]], mean * product[1][changed[0]])
    assert all(not p.requires_grad for p in kept.parameters()) and sum(p.held for p in adapter.parts) == 3
    moved = [p for p in adapter.parts if not p.held]
    assert moved and all(any(float(t.detach().abs().max()) == 0 for t in p.parameters()) for p in moved)  # LoRA's B is zero again


def test_a_start_from_data_sees_the_batches() -> None:
    model, inputs = fresh("gpt2")
    vn.attach(model, vn.gated(vn.LoRA(2, init="eva")), name="u", batches=[inputs])
    report = vn.settle(model, [inputs], retune=lambda m: None, rewind=True)
    other = build("gpt2")
    torch.manual_seed(0)
    vn.attach(other, report.plan, name="u", batches=[inputs])
    got = numbers(vn.Adapter(model, "u"))
    assert all(torch.allclose(p, got[n], atol=1e-6) for n, p in vn.Adapter(other, "u").named_parameters())


def test_what_is_kept_of_minilm_learns_tweets() -> None:
    """On real tweets, with numbers and gates that say nothing: what is kept learns the rows from its start."""
    transformers.set_seed(0)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("minilm"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_path("minilm"), num_labels=3, num_hidden_layers=2)
    rows, _ = table("tweets").split(24, 0, 0)
    names = sorted(set(rows.labels))
    inputs = dict(tokenizer(rows.texts, truncation=True, max_length=16, padding=True, return_tensors="pt", return_token_type_ids=False))
    inputs["labels"] = torch.tensor([names.index(x) for x in rows.labels])
    adapter = shake(vn.attach(model, vn.gated(vn.LoRA(4) + vn.IA3()) + vn.Full(at="head"), name="u"), scale=0.3)

    def miss() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(**inputs).loss)

    def again(m: Any) -> None:
        optimizer = vn.adamw(m, lr=0.05)
        for _ in range(15):
            m(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    report = vn.settle(model, [inputs], keep=0.5, score=lambda m: -miss(), retune=again, rewind=True)
    left = sum(r["parameters"] for r in report.parts if r["kept"])
    assert 0 < left <= 0.5 * sum(r["parameters"] for r in report.parts)
    assert report.steps == 15 and report.scored == 1 + len(report.parts) and miss() < 0.8  # chance is 1.1
    assert all(p.gate is None for p in adapter.parts)
