"""What a training loop asks of the adapters, what is frozen but saved, what parts share, and what a probe sees."""

from __future__ import annotations

import sys

import pytest
import torch

import veneer as vn
from helpers import build, fresh, look, refuses, unchanged
from veneer.methods.part import Bank, like
from veneer.methods.parts import DeltaPart
from veneer.ops.weights import asked, weight_of
from veneer.probe import Probe
from veneer.resolve import sites


def loss_of(out):
    return out.logits.float().square().mean() if hasattr(out, "logits") else out[0].float().square().mean()


def test_groups_hold_every_parameter_once():
    model, _ = fresh()
    vn.attach(model, vn.gated(vn.LoRA(2) + vn.Bottleneck(3)))
    groups = vn.param_groups(model, 1e-3, weight_decay=0.1)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(p.dim() > 1 or g["weight_decay"] == 0 for g in groups for p in g["params"])
    with refuses(vn.AdapterError, "not a learning rate"):
        vn.param_groups(model, float("nan"))
    with refuses(vn.AdapterError, "nothing here is trainable"):
        vn.param_groups(build().requires_grad_(False), 1e-3)


def test_each_method_at_a_rate_of_its_own():
    model, _ = fresh()
    plan = vn.gated(vn.LoRA(2, b_rate=16.0) + vn.paced(vn.IA3() + vn.paced(vn.Prefix(2), 2.0), 5.0), rate=3.0) + vn.paced(vn.Full(at="head"), 4.0)
    parts = vn.attach(model, vn.Plan.from_dict(plan.to_dict()), name="a").parts
    rate = {id(p): g["lr"] for g in vn.param_groups(model, 1e-3) for p in g["params"]}
    want = {"lora A": 1, "lora B": 16, "ia3 l": 5, "prefix keys": 10, "prefix values": 10, "full tensor": 4}
    seen = set()
    for part in parts:
        for key, p in part.named_parameters():
            seen.add(f"{part.method_name} {key}")
            assert rate[id(p)] == pytest.approx(1e-3 * (3 if key.startswith("gate.") else want[f"{part.method_name} {key}"]))
    assert {s for s in seen if "gate" not in s} == set(want) and sum("gate.weight" in s for s in seen) == 3


def test_paces_that_the_methods_declare():
    plan = vn.paced(vn.gated(vn.LoRA(2) + vn.IA3()) + vn.Full(at="head"))
    assert plan == vn.gated(vn.LoRA(2) + vn.paced(vn.IA3(), 6.0)) + vn.paced(vn.Full(at="head"), 2.0)
    assert vn.paced(vn.IA3()) == vn.IA3()
    with refuses(vn.PlanError, "paced takes plans"):
        vn.paced("lora", 2.0)
    with refuses(vn.PlanError, "by is -1"):
        vn.paced(vn.LoRA(2), -1)


def test_penalty_and_advance_do_nothing_where_nothing_is_asked():
    model, _ = fresh()
    vn.attach(model, vn.LoRA(2))
    assert float(vn.penalty(model)) == 0
    vn.advance(model, 1, 3)
    for ask in (
        lambda: vn.penalty(model, ["defualt"]),
        lambda: vn.advance(model, 1, 3, names=["defualt"]),
        lambda: vn.param_groups(model, 1e-3, names=["defualt"]),
    ):
        with refuses(vn.AdapterError, "no adapter called 'defualt' is attached", "Did you mean 'default'"):
            ask()
    with refuses(vn.AdapterError, "step 4 of 3"):
        vn.advance(model, 4, 3)


def test_gradients_and_squares_are_autograds_own():
    model, inputs = fresh()
    site = next(s for s in sites(model) if s.port == "weight" and s.role == "attn.q")
    p = model.get_submodule(site.path).weight
    batches = [inputs, {k: v[:1] for k, v in inputs.items()}]
    with unchanged(model):
        (found,) = Probe(model, batches, loss_of).gradients([site])
        (squares,) = Probe(model, batches, loss_of).squares([site])
    mean = sum(torch.autograd.grad(loss_of(model(**b)), p)[0] for b in batches) / 2
    torch.testing.assert_close(found, mean)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["input_ids"]))]
    fisher = sum(torch.autograd.grad(loss_of(model(**r)), p)[0] ** 2 for r in rows) / len(rows)
    torch.testing.assert_close(squares, fisher)


def test_directions_are_those_of_one_large_svd():
    model, inputs = fresh(batch=4, length=9)
    site = next(s for s in sites(model) if s.port == "weight" and s.role == "ffn.up")
    seen = []
    handle = model.get_submodule(site.path).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    look(model, inputs)
    handle.remove()
    _, s, v = torch.linalg.svd(torch.cat(seen), full_matrices=False)
    halves = [{k: t[:2] for k, t in inputs.items()}, {k: t[2:] for k, t in inputs.items()}]
    with unchanged(model):
        ((directions, share),) = Probe(model, halves, loss_of).directions([site], 4)
    torch.testing.assert_close(share, s[:4] ** 2 / (s**2).sum(), atol=2e-3, rtol=2e-2)
    assert float((directions[0] @ v[0]).abs()) > 0.999


def test_a_probe_says_what_is_missing():
    model, inputs = fresh()
    with refuses(vn.CapabilityError, "no batches", model=model):
        vn.attach(model, vn.LoRA(2), batches=[])
    site = next(s for s in sites(model) if s.port == "weight" and s.role == "attn.q")
    with refuses(vn.CapabilityError, "no loss", "labels", model=model):
        Probe(model, [inputs]).gradients([site])


def test_a_packed_matrix_is_asked_for():
    model = build("llama")
    site = next(s for s in sites(model) if s.port == "weight" and s.role == "ffn.down")
    module = model.get_submodule(site.path)
    vn.attach(model, vn.LoRA(2, at="linear"))
    torch.testing.assert_close(asked(module, site.inp, module.weight), module.weight.detach())
    part = next(p for p in vn.Adapter(model, "default").parts if p.site.path == site.path)
    assert torch.equal(weight_of(module, site, part.map), module.weight) and not part.weight().requires_grad


class Shared(Bank):
    def __init__(self, build_) -> None:
        super().__init__()
        new = like(build_, self.site)
        self.frozen("basis", torch.empty(2, 32, **new).normal_())
        self.level = torch.nn.Parameter(torch.zeros(32, 2, **new))


class UsesShared(DeltaPart):
    def delta(self):
        return self.bank.level @ self.bank.basis


class Tied(vn.LoRA):
    """A method whose parts share all they have."""

    name = "tied-test"
    default_at = "attn.{q,o}"

    def parts(self, sites, build):
        bank = Shared(build)
        yield bank.site, bank
        for site, part in super().parts(sites, build):
            part.__dict__["bank"] = bank
            yield site, part

    def part(self, site, build):
        return UsesShared(site, build)


@pytest.fixture
def tied(monkeypatch):
    methods = sys.modules["veneer.methods"]
    known = methods.registered()
    monkeypatch.setattr(methods, "registered", lambda: (*known, Tied))
    return Tied()


def test_what_parts_share_is_one_and_what_is_frozen_is_saved(tied, tmp_path):
    model, inputs = fresh()
    before = look(model, inputs)
    with unchanged(model):
        adapter = vn.attach(model, tied, name="a")
        vn.attach(model, vn.LoRA(2), name="b", activate=False)
        assert adapter.num_parameters == 64
        assert torch.equal(look(model, inputs), before)
        with torch.no_grad():
            next(iter(adapter.parameters())).normal_()
        after = look(model, inputs)
        assert not torch.allclose(after, before)
        vn.save(model, tmp_path / "a", name="a")
        other, _ = fresh()
        vn.load(other, tmp_path / "a")
        assert torch.equal(look(other, inputs), after)
        vn.merge(model, "a")
        torch.testing.assert_close(look(model, inputs), after, atol=1e-4, rtol=1e-4)
        vn.unmerge(model)
        vn.detach(model)
