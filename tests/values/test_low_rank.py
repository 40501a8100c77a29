"""The kin of LoRA against peft, and against their equations written out where peft has none."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer as vn
from helpers import build, fresh, grads, look, loss, refuses, shake
from veneer.methods.base import Build
from veneer.methods.loretta import LoRETTAPart, split

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
AT = r"name:.*\.(q_proj|k_proj|up_proj|down_proj)"


def same(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def both(method: Any, config: Any, seed: int = 5) -> tuple[Any, vn.Adapter, Any, list[tuple[Any, Any]]]:
    """Our model, moved from its start, peft's, and our parts with peft's layers."""
    torch.manual_seed(2)
    other = peft.get_peft_model(build("llama"), config).eval()
    model = build("llama")
    adapter = shake(vn.attach(model, method), seed)
    found = [(p, other.get_submodule(f"base_model.model.{p.site.path}")) for p in adapter.parts if p.acts]
    assert len(found) == 8
    return model, adapter, other, found


def check(model: Any, other: Any, names: list[tuple[Tensor, Tensor]], atol: float = 1e-5) -> None:
    """The same logits and the same gradients, where peft has our numbers."""
    inputs = fresh("llama")[1]
    seen = set()
    with torch.no_grad():
        base = look(build("llama"), inputs)
        assert not torch.allclose(look(model, inputs), base, atol=1e-4)
        same(look(model, inputs), other(**inputs).logits, atol)
    model(**inputs).logits.square().mean().backward()
    other(**inputs).logits.square().mean().backward()
    for mine, their in names:
        if id(mine) not in seen and mine.requires_grad:
            seen.add(id(mine))
            same(mine.grad, their.grad.reshape(mine.grad.shape), 1e-5)
    assert seen


def put(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        for mine, their in pairs:
            # a shared matrix may be larger there; only its leading part is used
            their.copy_(mine.reshape(their.shape)) if mine.numel() == their.numel() else their[tuple(slice(n) for n in mine.shape)].copy_(mine)
    return pairs


def test_vera() -> None:
    config = peft.VeraConfig(r=6, target_modules=TARGETS, d_initial=0.1)
    model, adapter, other, found = both(vn.VeRA(6, at=AT), config)
    bank, pairs = adapter.parts[0], []
    for p, layer in found:
        pairs += [(p.d, layer.vera_lambda_d["default"]), (p.b, layer.vera_lambda_b["default"])]
        pairs += [(bank.A, layer.vera_A["default"]), (bank.B, layer.vera_B["default"])]
    check(model, other, put(pairs))
    fan = bank.A.shape[1]  # as peft draws them
    assert bank.A.abs().max() <= (6 / fan) ** 0.5 and bank.B.abs().max() <= 1 and bank.B.abs().max() > 0.9


def test_vblora() -> None:
    config = peft.VBLoRAConfig(r=2, target_modules=TARGETS, num_vectors=7, vector_length=8, topk=2)
    model, adapter, other, found = both(vn.VBLoRA(2, vectors=7, length=8, at=AT), config)
    bank, pairs = adapter.parts[0], []
    for p, layer in found:
        pairs += [(p.logits_A, layer.vblora_logits_A["default"]), (p.logits_B, layer.vblora_logits_B["default"])]
    pairs.append((bank.v, found[0][1].vblora_vector_bank["default"]))
    check(model, other, put(pairs))
    rates = {id(p): g["lr"] for g in vn.param_groups(model, 1e-2) for p in g["params"]}
    assert rates[id(bank.v)] == pytest.approx(1e-3) and rates[id(found[0][0].logits_A)] == 1e-2


@pytest.mark.parametrize("r", [6, 4])
def test_randlora(r: int) -> None:
    config = peft.RandLoraConfig(r=r, randlora_alpha=9, target_modules=TARGETS)
    model, adapter, other, found = both(vn.RandLoRA(r, alpha=9, at=AT), config)
    bank, pairs = adapter.parts[0], []
    for p, layer in found:
        pairs += [(p.lambdas, layer.randlora_lambda["default"]), (p.gammas, layer.randlora_gamma["default"])]
        pairs += [(bank.A, layer.randlora_A["default"]), (bank.B, layer.randlora_B["default"])]
    check(model, other, put(pairs), 1e-4)
    fresh_one = vn.attach(build("llama"), vn.RandLoRA(r, at=AT))
    for p, layer in zip([p for p in fresh_one.parts if p.acts], [layer for _, layer in found], strict=True):
        layer.reset_randlora_parameters("default")
        same(p.gammas, layer.randlora_gamma["default"])
        assert p.scale == 20


@pytest.mark.parametrize(("share", "tying"), [("none", 0.0), ("all", 1.0)])
def test_tinylora(share: str, tying: float) -> None:
    config = peft.TinyLoraConfig(r=2, u=5, weight_tying=tying, target_modules=TARGETS)
    model, _, other, found = both(vn.TinyLoRA(2, u=5, share=share, at=AT), config)
    pairs = []
    for p, layer in found:
        same(p.B @ p.A, layer.tinylora_B["default"] @ layer.tinylora_A["default"])
        v = p.v if share == "none" else p.bank.v
        pairs += [(v, layer.tinylora_v["default"][layer._tinylora_v_key["default"]]), (p.P, layer.tinylora_P["default"])]
        pairs += [(p.A, layer.tinylora_A["default"]), (p.B, layer.tinylora_B["default"])]
    check(model, other, put(pairs))
    assert sum(p.numel() for p in vn.Adapter(model, "default").parameters()) == (5 if share == "all" else 40)


def test_tinyloras_shared_vectors_outlive_settling(tmp_path: Any) -> None:
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.gated(vn.TinyLoRA(2, u=3, share="role"))))
    assert sum(p.numel() for p in adapter.parts[0].parameters()) == 2 * 3
    vn.settle(model, [inputs], keep=1)
    vn.save(model, tmp_path / "a")
    again = build("llama")
    vn.load(again, tmp_path / "a")
    assert torch.equal(look(again, inputs), look(model, inputs))


# -- AdaLoRA ------------------------------------------------------------------------------------------------------------
def test_adalora_is_pefts_through_training() -> None:
    """Ten steps of SGD on the same data: the same losses with the penalty, numbers, and triplets kept."""
    total = 10
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=4, tinit=2, tfinal=3, deltaT=2, beta1=0.8, beta2=0.9, orth_reg_weight=0.3, total_step=total, target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    plan = vn.AdaLoRA(4, target=2, alpha=4, warmup=0.2, final=0.3, every=2, beta1=0.8, beta2=0.9, orthogonal=0.3, at=AT)
    model, adapter, other, found = both(plan, config, 6)
    pairs = []
    for p, layer in found:
        pairs += [(p.A, layer.lora_A["default"]), (p.B, layer.lora_B["default"]), (p.E, layer.lora_E["default"])]
    put(pairs)
    inputs = fresh("llama")[1]
    inputs["labels"] = inputs["input_ids"].clone()
    same(look(model, inputs), other(**inputs).logits.detach(), 1e-4)
    mine = torch.optim.SGD(list(adapter.parameters()), lr=0.05)
    their = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.05)
    kept = []
    for step in range(1, total + 1):
        loss = model(**inputs).loss + vn.penalty(model)
        theirs = other(**inputs).loss
        same(loss, theirs, 1e-4)
        for value, optimiser in ((loss, mine), (theirs, their)):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        vn.advance(model, step, total)
        other.base_model.update_and_allocate(step)
        kept.append(sum(int((p.E != 0).sum()) for p, _ in found))
        for p, layer in found:
            assert torch.equal(p.E != 0, layer.lora_E["default"].flatten() != 0), (step, p.site.path)
            same(p.E, layer.lora_E["default"].flatten(), 1e-4)
    assert kept[0] == 32 and kept[-1] == 16 and len(set(kept)) > 2
    assert sum(int(p.kept.sum()) for p, _ in found) == 16 and len({int(p.kept.sum()) for p, _ in found}) > 1


def test_adaloras_mask_is_saved_and_holds(tmp_path: Any) -> None:
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.AdaLoRA(4, target=1)))
    for step in (1, 2, 3, 4):
        adapter.parts[0].A.grad = None
        model(**inputs).logits.square().mean().backward()
        vn.advance(model, step, 4)
    mask = [p.kept.clone() for p in adapter.parts]
    assert sum(int(m.sum()) for m in mask) == len(mask)
    vn.save(model, tmp_path / "a")
    again = vn.load(build("llama"), tmp_path / "a")
    for p, m in zip(again.parts, mask, strict=True):
        assert torch.equal(p.kept, m) and torch.equal(p.E != 0, m)


def test_adalora_counts_down_a_cubic_curve() -> None:
    m = vn.AdaLoRA(12, target=8)
    counts = [m.budget(10, step, 10, 50, 120) for step in (10, 20, 30, 40, 50)]
    assert counts == [120, int(40 * 0.75**3 + 80), 85, int(40 * 0.25**3 + 80), 80]


# -- no reference but the paper -----------------------------------------------------------------------------------------
def deltas(adapter: vn.Adapter, dense: Any, atol: float = 1e-5) -> None:
    """The method on its model is the base with dense(part) added to every matrix."""
    model, inputs = adapter.model, fresh("llama")[1]
    base = build("llama")
    with torch.no_grad():
        for p in adapter.parts:
            if p.acts:
                base.get_submodule(p.site.path).weight.add_(dense(p))
    same(look(model, inputs), look(base, inputs), atol)


def test_lora_xs() -> None:
    adapter = shake(vn.attach(build("llama"), vn.LoRAXS(3, alpha=6)))

    def dense(p: Any) -> Tensor:
        u, s, v = torch.linalg.svd(p.weight())
        sign = torch.sign((p.A * v[:3]).sum(1))
        return 2 * (u[:, :3] * sign) @ torch.diag(s[:3]) @ p.R @ (v[:3] * sign[:, None])

    deltas(adapter, dense, 1e-4)
    assert sum(p.numel() for p in adapter.parameters()) == 9 * len(adapter.parts)


def test_tied_lora() -> None:
    model = build("llama")
    adapter = shake(vn.attach(model, vn.TiedLoRA(3, alpha=6, at=AT)))
    bank = adapter.parts[0]

    def dense(p: Any) -> Tensor:
        return 2 * torch.diag(p.v) @ bank.B[: p.site.out] @ torch.diag(p.u) @ bank.A[:, : p.site.inp]

    deltas(adapter, dense)
    plain = vn.attach(build("llama"), vn.TiedLoRA(3, vectors=False))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in plain.parts[0].parameters())


@pytest.mark.parametrize("mixer", ["orthogonal", "kaiming"])
def test_moslora(mixer: str) -> None:
    adapter = vn.attach(build("llama"), vn.MoSLoRA(3, mixer=mixer))
    if mixer == "orthogonal":
        for p in adapter.parts:
            same(p.M @ p.M.T, torch.eye(3))
    shake(adapter)
    deltas(adapter, lambda p: 2 * p.B @ p.M @ p.A)


def test_unilora() -> None:
    config = peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=TARGETS)
    model, adapter, other, found = both(vn.UniLoRA(2, length=30, at=AT), config)
    bank, pairs = adapter.parts[0], []
    for p, layer in found:
        a, b = p.index_A.long(), p.index_B.long()
        pairs += [(a, layer.unilora_indices_A["default"]), (b, layer.unilora_indices_B["default"])]
        pairs += [(bank.norm[a], layer.unilora_scales_A["default"]), (bank.norm[b], layer.unilora_scales_B["default"])]
    pairs.append((bank.theta, found[0][1].unilora_theta_d["default"]))
    check(model, other, put(pairs))
    entries = torch.cat([t.flatten() for p, _ in found for t in (p.index_A, p.index_B)])
    counts = torch.bincount(entries, minlength=30)
    assert counts.max() - counts.min() <= 1
    same(bank.norm, counts.float().rsqrt())


def test_loretta() -> None:
    adapter = shake(vn.attach(build("llama"), vn.LoRETTA(3, t=2, cores=2, alpha=6)))

    def dense(p: Any) -> Tensor:
        a, b = (torch.einsum("xia,ajb,bky->ijk", *f).reshape(-1, 3) for f in (list(p.A), list(p.B)))
        return 2 * b @ a.T

    deltas(adapter, dense)
    assert split(768, 3) == [8, 8, 12] and split(32, 2) == [4, 8] and split(7, 3) == [1, 1, 7]
    large = vn.attach(build("llama"), vn.LoRETTA(8, at="attn.q"), name="b").parts[0]
    sampled = torch.stack([LoRETTAPart(large.site, Build(build("llama"), module=large.module), vn.LoRETTA(8)).pair()[0].detach() for _ in range(60)])
    assert 0.7 < float(sampled.var() * 3 * 32) < 1.4  # LoRA's


def test_what_is_left_after_settling_fits_a_smaller_bank(tmp_path: Any) -> None:
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.gated(vn.VeRA(4, at="attn.q,ffn.down"))))
    with torch.no_grad():
        for p in adapter.parts:
            if p.gate is not None:
                p.gate.bias.fill_(3.0 if p.site.role == "attn.q" else -3.0)
    vn.settle(model, [inputs], keep=1)
    after = look(model, inputs)
    vn.save(model, tmp_path / "a")
    again = build("llama")
    vn.load(again, tmp_path / "a")
    assert torch.equal(look(again, inputs), after)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every input's .grad, also where it has none
def test_all_compile_without_graph_breaks_and_checkpoint() -> None:
    model, inputs = fresh("bert")
    plan = vn.DoRA(2, at="attn.q") + vn.VeRA(4, at="attn.k") + vn.AdaLoRA(2, target=1, at="attn.v") + vn.TinyLoRA(2, u=3, at="attn.o")
    plan += vn.VBLoRA(2, vectors=5, length=8, at="ffn.up") + vn.UniLoRA(2, length=9, at="ffn.down") + vn.LoRETTA(2, cores=2, at="ffn.down")
    adapter = shake(vn.attach(model, plan + vn.LoftQ(2, at="ffn.up") + vn.RandLoRA(8, at="attn.o") + vn.LoRA(2, init="pissa", at="ffn.up")), scale=0.02)
    plain = look(model, inputs)
    loss(model, inputs).backward()
    expected = grads(adapter)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss(model, inputs).backward()
    for n, g in grads(adapter).items():
        torch.testing.assert_close(g, expected[n], atol=1e-4, rtol=1e-3, msg=n)
    model.gradient_checkpointing_disable()
    model.zero_grad()
    torch._dynamo.reset()
    layer = model.bert.encoder.layer[0]
    layer.compile(backend="aot_eager", fullgraph=True)
    model.eval()
    same(look(model, inputs), plain)
    loss(model, inputs).backward()
    for n, g in grads(adapter).items():
        torch.testing.assert_close(g, expected[n], atol=1e-4, rtol=1e-3, msg=n)
    torch._dynamo.reset()


# -- errors -------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda: vn.AdaLoRA(4, target=8), "target=8 is over r=4", "Use r=8"),
    (lambda: vn.AdaLoRA(4, target=2, warmup=0.6, final=0.5), "leave no steps", "under 1"),
    (lambda: vn.VBLoRA(2, vectors=1), "k=2 is over the 1 vectors", "k=1"),
    (lambda: vn.VBLoRA(2, bound=0), "bound and bank_rate must be positive", ""),
    (lambda: vn.TinyLoRA(2, share="layer"), "share is 'layer'", "role"),
    (lambda: vn.MoSLoRA(2, mixer="zero"), "mixer is 'zero'", "orthogonal"),
    (lambda: vn.UniLoRA(2, bound=0), "bound must be positive", ""),
    (lambda: vn.VeRA(0), "r must be", ""),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()


def test_sizes_that_do_not_fit() -> None:
    model = build("llama")
    with refuses(vn.PlanError, "length=7 does not divide", "Use length=4", model=model):
        vn.attach(model, vn.VBLoRA(2, vectors=4, length=7))
    with refuses(vn.PlanError, "length=9999 is over the", "or less", model=model):
        vn.attach(model, vn.UniLoRA(2, length=9999))
    for method in (vn.RandLoRA(99), vn.LoRAXS(99), vn.TinyLoRA(99), vn.MoSLoRA(99), vn.AdaLoRA(99)):
        with refuses(vn.PlanError, "rank 99 is over the rank", model=model):
            vn.attach(model, method)
