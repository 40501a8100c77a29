"""WaveFT, PVeRA, Polytropon and CorDA: against peft, and against other ways to compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import pywt
import torch
from test_low_rank import AT, TARGETS, both, check, put, same

import veneer as vn
from helpers import build, fresh, look, loss, refuses, shake
from peft_further import T
from test_peft_format import close, logits, quietly, shaken


# -- WaveFT -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wavelet", ["db1", "db3", "coif1", None])
def test_waveft_is_pefts(wavelet: str | None) -> None:
    config = peft.WaveFTConfig(n_frequency=30, scaling=2.0, wavelet_family=wavelet or "db1", use_idwt=wavelet is not None, target_modules=TARGETS)
    model, _, other, found = both(vn.WaveFT(30, scale=2.0, wavelet=wavelet, at=AT), config)
    check(model, other, put([(p.c, layer.waveft_spectrum["default"]) for p, layer in found]))


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym5", "coif5"])
def test_waveft_is_the_inverse_transform(wavelet: str) -> None:
    """PyWavelets' own two-dimensional inverse of the same coefficients, cut to the matrix."""
    adapter = shake(vn.attach(build("llama"), vn.WaveFT(30, scale=2.0, wavelet=wavelet, at="ffn.down,attn.q")))
    for p in adapter.parts:
        c = np.zeros(p.sizes)
        pad = p.lo.numel() // 2 - 1
        c[p.index.numpy() // p.site.inp + pad, p.index.numpy() % p.site.inp + pad] = p.c.detach().numpy()
        m, n = (s // 2 for s in p.sizes)
        # quarters are named by the direction of their detail, so the upper right one is PyWavelets' horizontal
        dense = pywt.idwt2((c[:m, :n], (c[:m, n:], c[m:, :n], c[m:, n:])), wavelet)[: p.site.out, : p.site.inp]
        same(p.delta(), torch.tensor(2.0 * dense, dtype=torch.float32))


def test_waveft_of_odd_sizes_and_without_a_matrix() -> None:
    """Filters along activations give what the matrix gives, also where in and out are odd."""
    host = torch.nn.Sequential(torch.nn.Linear(7, 11))
    adapter = shake(vn.attach(host, vn.WaveFT(20, wavelet="db2", at="name:0")))
    (p,) = adapter.parts
    assert p.sizes == (14, 10)
    x = torch.randn(3, 5, 7)
    same(p.deviation(x, torch.zeros(3, 5, 11)), x @ p.delta().T)


def test_waveft_of_proportional_shares(tmp_path: Path) -> None:
    """PEFT deals the coefficients out by size; here each map has its own number."""
    config = peft.WaveFTConfig(n_frequency=40, target_modules=["q_proj", "down_proj"], proportional_parameters=True)
    theirs, inputs = shaken(build("llama"), config), fresh("llama")[1]
    quietly(theirs.save_pretrained, tmp_path)
    model = build("llama")
    adapter = vn.load(model, tmp_path)
    assert len({p.c.numel() for p in adapter.parts}) == 2
    close(logits(model, inputs), logits(theirs, inputs), inputs)


# -- PVeRA --------------------------------------------------------------------------------------------------------------
def pvera(plan: vn.PVeRA, **more: Any) -> tuple[Any, Any, list[Any], Any]:
    config = peft.PveraConfig(r=plan.r, target_modules=TARGETS, **more)
    model, adapter, other, found = both(plan, config)
    bank, pairs = adapter.parts[0], []
    for p, layer in found:
        pairs += [(p.d, layer.pvera_lambda_d["default"]), (p.b, layer.pvera_lambda_b["default"])]
        pairs += [(bank.A, layer.pvera_A["default"]), (bank.B, layer.pvera_B["default"])]
    return model, other, pairs, found


def test_pvera_at_rest_is_pefts() -> None:
    model, other, pairs, found = pvera(vn.PVeRA(6, at=AT))
    for p, _ in found:
        same(p.d, torch.full_like(p.d, 0.1), 1.0)
    with torch.no_grad():
        put(pairs)
        inputs = fresh("llama")[1]
        same(look(model, inputs), other(**inputs).logits)


@pytest.mark.parametrize("sample", [False, True])
def test_pvera_draws_what_peft_draws(sample: bool) -> None:
    """Both draw for each map in the order of the call, from one generator: the same numbers and gradients."""
    model, other, pairs, _ = pvera(vn.PVeRA(6, at=AT, sample=sample), sample_at_inference=sample)
    put(pairs)
    inputs = fresh("llama")[1]
    model.train(not sample), other.train(not sample)
    torch.manual_seed(4)
    mine = model(**inputs).logits
    torch.manual_seed(4)
    theirs = other(**inputs).logits
    same(mine, theirs)
    mine.square().mean().backward(), theirs.square().mean().backward()
    for own, their in pairs:
        if own.requires_grad:
            same(own.grad, their.grad)
    again = model(**inputs).logits
    assert not torch.allclose(again, mine)
    if sample:
        with refuses(vn.CapabilityError, "pvera"):
            vn.merge(model)


def test_pveras_divergence() -> None:
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.PVeRA(4, kl=0.5, at="attn.q@0")))
    part, bank, seen = adapter.parts[1], adapter.parts[0], []
    model.get_submodule(part.site.path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.train()
    loss(model, inputs)
    z = part.d * (seen[0] @ bank.A.T)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(z[..., :4], (z[..., 4:] / 2).exp()), normal(0.0, 1.0)).mean() * 0.5
    same(vn.penalty(model), expected)
    assert float(vn.penalty(model)) == 0


# -- Polytropon ----------------------------------------------------------------------------------------------------------
def test_poly_tasks_are_pefts() -> None:
    """Tasks as adapters that share their skills, on rows of one batch, where PEFT is given task_ids."""
    config = peft.PolyConfig(r=3, n_tasks=2, n_skills=3, n_splits=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    other = shaken(build("llama"), config)
    model, inputs = fresh("llama")
    tasks = [vn.attach(model, vn.Poly(3, skills=3, splits=2, at=AT, shared=s), name=n, activate=False) for n, s in (("a", None), ("b", "a"))]
    pairs = []
    for a, b in zip(*(t.parts for t in tasks), strict=True):
        layer = other.get_submodule(f"base_model.model.{a.site.path}")
        assert a.A is b.A and a.B is b.B and a.z is not b.z
        logits_of = layer.poly_router["default"].module_logits
        with torch.no_grad():
            a.A.copy_(layer.poly_lora_A["default"].mT), a.B.copy_(layer.poly_lora_B["default"].mT)
            for i, p in enumerate((a, b)):
                p.z.copy_(logits_of[i].reshape(2, 3))
        pairs.append((a, b, layer, logits_of))
    theirs = other(**inputs, task_ids=torch.tensor([0, 1, 0])).logits
    with vn.route(model, ["a", "b", "a"]):
        mine = model(**inputs).logits
    same(mine, theirs)
    mine.square().mean().backward(), theirs.square().mean().backward()
    for a, b, layer, logits_of in pairs:
        same(a.A.grad, layer.poly_lora_A["default"].grad.mT)
        same(torch.stack([a.z.grad, b.z.grad]).flatten(1), logits_of.grad)


def test_poly_draws_while_training() -> None:
    """The mean of many draws is the relaxed Bernoulli's; at rest and when merged there is none."""
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.Poly(2, skills=3, at="attn.q@0")))
    (p,) = adapter.parts
    still = look(model, inputs)
    assert torch.equal(look(model, inputs), still)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mine = torch.stack([p.pair()[1] for _ in range(3000)]).mean(0)
        s = torch.distributions.RelaxedBernoulli(1.0, logits=p.z.expand(3000, 1, 3)).sample()
        theirs = torch.einsum("nqs,qsor->nor", s / s.sum(-1, keepdim=True), p.B).mean(0)
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0)
    assert not torch.equal(p.pair()[1], p.pair()[1])
    vn.merge(model)
    model.eval()
    same(look(model, inputs), still, 1e-4)


def test_files_of_several_tasks_are_refused(tmp_path: Path) -> None:
    config = peft.PolyConfig(r=3, n_tasks=2, target_modules=TARGETS)
    quietly(shaken(build("llama"), config).save_pretrained, tmp_path)
    model = build("llama")
    with refuses(vn.StoreError, "holds 2 tasks", "n_tasks=1", model=model):
        vn.load(model, tmp_path)
    with refuses(vn.PlanError, "no adapter called 'a'", "", model=model):
        vn.attach(model, vn.Poly(shared="a"))


# -- CorDA ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_papers_and_pefts(mode: str) -> None:
    """Σ_i σ_i u_i v_iᵀ C⁻¹ over r triplets of W C, by eigenvectors of (W C)(W C)ᵀ in double; and peft's B A."""
    from peft.tuners.lora.corda import preprocess_corda

    inputs, init = {"input_ids": torch.arange(5, 45)[None]}, "corda" if mode == "ipm" else "corda-kpm"
    model = build("llama")
    adapter = vn.attach(model, vn.LoRA(3, init=init, alpha=6, at="attn.{q,v}"), batches=[inputs])
    plain = build("llama")
    same(look(model, inputs), look(plain, inputs))
    seen: dict[str, Any] = {}
    for p in adapter.parts:
        plain.get_submodule(p.site.path).register_forward_pre_hook(lambda _, args, k=p.site.path: seen.update({k: args[0][0].detach().double()}))
    look(plain, inputs)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=T, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode)
    )
    other = build("llama")
    preprocess_corda(other, config, run_model=lambda: other(**inputs))
    other = quietly(peft.get_peft_model, other, config)
    for p in adapter.parts:
        w, x = p.weight().double(), seen[p.site.path]
        c = x.T @ x / len(x)
        c += 0.01 * c.diagonal().mean() * torch.eye(len(c))
        u = torch.linalg.eigh((w @ c) @ (w @ c).T).eigenvectors  # ascending
        u = u[:, -3:] if mode == "ipm" else u[:, :3]
        # u uᵀ W C, the part of W C in those directions, times C⁻¹
        same(p.scale * p.B0 @ p.A0, (u @ u.T @ w).float(), 1e-4)
        layer = other.get_submodule(f"base_model.model.{p.site.path}")
        same(p.scale * p.B @ p.A, 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight, 1e-4)


def test_corda_looks_at_vectors() -> None:
    model, inputs = fresh("llama")
    with refuses(vn.PlanError, "'corda' looks at input vectors", "Leave it out", model=model):
        vn.attach(model, vn.LoRA(2, init="corda", at="embed"), batches=[inputs])
    with refuses(vn.PlanError, "looks at data", "batches=", model=model):
        vn.attach(model, vn.LoRA(2, init="corda-kpm"))


BAD = [
    (lambda: vn.WaveFT(0), "n must be", ""),
    (lambda: vn.WaveFT(9, wavelet="db99"), "wavelet is 'db99'", "sym2 to sym20"),
    (lambda: vn.WaveFT(9, wavelet="sym1"), "wavelet is 'sym1'", "None"),
    (lambda: vn.PVeRA(4, kl=-1), "kl must not be negative", ""),
    (lambda: vn.Poly(0), "r must be", ""),
    (lambda: vn.Poly(shared=""), "shared is the name", ""),
    (lambda: vn.PVeRA(4, sample=1), "sample must be True or False", ""),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()


def test_what_does_not_fit() -> None:
    model = build("llama")
    with refuses(vn.PlanError, "n=99999 is over the 1024 entries", "n=1024", model=model):
        vn.attach(model, vn.WaveFT(99999, at="attn.q"))
    with refuses(vn.PlanError, "splits=5 does not divide", "splits=1", model=model):
        vn.attach(model, vn.Poly(splits=5))
    with refuses(vn.PlanError, "rank 99 is over", model=model):
        vn.attach(model, vn.Poly(99))


def test_wavelets_other_than_haars_need_pywavelets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[vn.WaveFT.__module__], "find_spec", lambda _: None)
    model = build("llama")
    with refuses(vn.PlanError, "PyWavelets, which is not installed", r"veneer\[wavelets\]", model=model):
        vn.attach(model, vn.WaveFT(9, wavelet="db2"))
    vn.attach(model, vn.WaveFT(9))
