"""Methods in subspaces that W itself gives, and their kin: PEFT's logits, and the papers' equations written out."""

from __future__ import annotations

import sys
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_deltas import LLAMA, ours, same, take

import veneer as vn
from helpers import build, fresh, grads, look, loss, refuses, shake, weights_of
from test_peft_format import shaken
from veneer.methods.subspaces import segmented
from veneer.train.trainer import fill_with, tensors_in


# -- PSOFT --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("orthogonal", [True, False])
def test_psoft(orthogonal: bool) -> None:
    theirs = shaken(build("llama"), peft.PsoftConfig(r=5, psoft_alpha=7, psoft_orth=orthogonal, target_modules=LLAMA))

    def copy(part: Any, layer: Any) -> None:
        r = layer.psoft_R["default"]
        part.Q.copy_(r.weight) if orthogonal else part.D.copy_(r.weight - torch.eye(5))
        part.before.copy_(r.vector_a)
        part.after.copy_(r.vector_b)
        torch.testing.assert_close(part.B @ part.A, layer._psoft_B_cache["default"] @ layer._psoft_A_cache["default"] * 7 / 5)

    same(*ours(vn.PSOFT(5, orthogonal=orthogonal), theirs, copy))


def test_psoft_keeps_the_angles_of_the_subspace_it_turns() -> None:
    """Without α and β: W' has W's singular values, and differs from W in the r leading directions alone."""
    part = shake(vn.attach(build("llama"), vn.PSOFT(6, before=False, after=False, at="ffn.down"))).parts[0]
    w = part.weight()
    moved = w + part.fold(w, None)[0]
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.linalg.svdvals(w), atol=1e-5, rtol=1e-5)
    rest = torch.linalg.svd(w, full_matrices=False)[2][6:]
    torch.testing.assert_close(moved @ rest.T, w @ rest.T, atol=1e-5, rtol=1e-5)
    assert (moved - w).norm() > 0.1


# -- PEANuT -------------------------------------------------------------------------------------------------------------
def test_peanut() -> None:
    theirs = shaken(build("llama"), peft.PeanutConfig(r=5, depth=2, act_fn="silu", scaling=0.7, target_modules=LLAMA))

    def copy(part: Any, layer: Any) -> None:
        part.A.copy_(layer.peanut_A["default"].weight)
        part.B.copy_(layer.peanut_B["default"].weight)
        for mine, other in ((part.E, layer.peanut_encoders), (part.D, layer.peanut_decoders)):
            for p, q in zip(mine, other["default"], strict=True):
                p.copy_(q.weight)

    same(*ours(vn.PEANuT(5, layers=2, activation="silu", scale=0.7), theirs, copy))


# -- DEFT ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("projection", "inject"), [("relu", True), ("qr", True), ("qr", False)])
def test_deft(projection: str, inject: bool) -> None:
    theirs = shaken(build("llama"), peft.DeftConfig(r=3, alpha=2, decomposition_method=projection, para=not inject, target_modules=LLAMA))
    names = (("P", "deft_P"), ("R", "deft_R")) if inject else (("P", "deft_P"),)
    same(*ours(vn.DEFT(3, alpha=2, projection=projection, inject=inject), theirs, take(*names)))


def test_para_lowers_the_rank_and_relu_scales_exactly() -> None:
    part = vn.attach(build("bert"), vn.DEFT(4, projection="qr", inject=False)).parts[0]
    w = part.weight()
    assert torch.linalg.matrix_rank(w + part.fold(w, None)[0], rtol=1e-5) == min(w.shape) - 4
    for inject in (True, False):
        part = shake(vn.attach(build("bert"), vn.DEFT(4, inject=inject))).parts[0]
        whole = part.fold(w, None)[0]
        assert part.scale_by(0.3)
        torch.testing.assert_close(part.fold(w, None)[0], 0.3 * whole)


@pytest.mark.parametrize("method", [vn.DEFT(3), vn.GLoRA(2), vn.GLoRA(ab="vector", c="vector", de="vector")], ids=str)
def test_beside_a_trained_bias_it_merges_to_what_it_computed(method: Any) -> None:
    model, inputs = fresh("bert")
    shake(vn.attach(model, method + vn.BitFit()))
    before = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), before, atol=1e-5, rtol=1e-4)


# -- GLoRA --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kinds", [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none"), ("none", "lora", "none")])
def test_glora(kinds: tuple[str, str, str]) -> None:
    """On a decoder whose maps have biases."""
    ab, c, de = kinds
    theirs = shaken(build("opt"), peft.GloraConfig(r=3, config_A_B=ab, config_C=c, config_D_E=de, target_modules=LLAMA))

    def copy(part: Any, layer: Any) -> None:
        for name, p in part.named_parameters():
            path, _, factor = name.partition("_")
            p.copy_(getattr(getattr(layer, f"glora_{path}")["default"], f"X{factor}").reshape(p.shape))

    same(*ours(vn.GLoRA(3, ab=ab, c=c, de=de), theirs, copy, "opt"))


# -- OSF ----------------------------------------------------------------------------------------------------------------
def gradients(model: Any, inputs: Any) -> None:
    model(**inputs).logits.square().mean().backward()


def test_osf() -> None:
    """Logits and gradients, which are projected, at maps of all three shapes."""
    targets = [*LLAMA, "down_proj", "up_proj"]
    theirs = shaken(build("llama"), peft.OSFConfig(effective_rank=0.5, target_modules=targets))
    model, inputs = fresh("llama")
    adapter = vn.attach(model, vn.OSF(0.5, at=r"name:.*\.(" + "|".join(targets) + ")"))
    layers = [theirs.base_model.model.get_submodule(p.site.path).osf_svd_params["default"] for p in adapter.parts]
    with torch.no_grad():
        for part, layer in zip(adapter.parts, layers, strict=True):
            for name in "USV":
                getattr(part, name).copy_(layer[f"{name}_low"])
        same(look(model, inputs), theirs(**inputs).logits)
    gradients(model, inputs)
    gradients(theirs, inputs)
    shapes = set()
    for part, layer in zip(adapter.parts, layers, strict=True):
        shapes.add((part.site.out > part.site.inp) - (part.site.out < part.site.inp))
        for name in "USV":
            torch.testing.assert_close(getattr(part, name).grad, layer[f"{name}_low"].grad, atol=1e-6, rtol=1e-3)
    assert shapes == {-1, 0, 1}


def test_osf_steps_off_what_is_kept() -> None:
    """After plain gradient steps U stays orthogonal to W's leading left singular vectors, and V to the right ones."""
    model, inputs = fresh("bert")
    adapter = vn.attach(model, vn.OSF(0.5, at="ffn"))
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        loss(model, inputs).backward()
        optimiser.step()
    for part in adapter.parts:
        u, _, v = torch.linalg.svd(part.weight(), full_matrices=False)
        n = u.shape[1] - part.S.numel()
        assert (part.U - part.U0).norm() > 1e-4
        assert (u[:, :n].T @ part.U).abs().max() < 1e-5 and (part.V @ v[:n].T).abs().max() < 1e-5


# -- Lily ---------------------------------------------------------------------------------------------------------------
def test_lily() -> None:
    """Logits and gradients of what is shared, with PEFT's mean over the batch."""
    theirs = shaken(build("llama"), peft.LilyConfig(r=3, num_B=2, stride_A=2, scaling=0.7, target_modules=LLAMA))
    model, inputs = fresh("llama")
    bank, *parts = vn.attach(model, vn.Lily(3, stride=2, scale=0.7, per="batch")).parts
    layers = [theirs.base_model.model.get_submodule(p.site.path) for p in parts]
    with torch.no_grad():
        for part, layer in zip(parts, layers, strict=True):
            a, b = part.shared()
            a.copy_(layer.lily_A["default"].weight)
            b.copy_(layer.lily_B["default"].weight.reshape(b.shape))
            part.R.copy_(layer.lily_router["default"].weight)
        same(look(model, inputs), theirs(**inputs).logits)
    gradients(model, inputs)
    gradients(theirs, inputs)
    assert len(list(bank.parameters())) == 4  # two roles, and one stride
    for part, layer in zip(parts, layers, strict=True):
        a, b = (getattr(bank, name) for name in part.names)
        for mine, other in ((a, layer.lily_A), (b, layer.lily_B), (part.R, layer.lily_router)):
            torch.testing.assert_close(mine.grad.reshape(-1), other["default"].weight.grad.reshape(-1), atol=1e-6, rtol=1e-3)


def test_lily_token_by_token(tmp_path: Any) -> None:
    """The equation, one token and one B at a time; and what is shared outlives settling."""
    model, inputs = fresh("llama")
    adapter = vn.attach(model, vn.gated(vn.Lily(3, experts=4, stride=2)))
    part = shake(adapter).parts[1]
    a, b = part.shared()
    x, h = torch.randn(2, 5, part.site.inp), torch.randn(2, 5, part.site.out)
    with torch.no_grad():
        got = part.deviation(x, h)
    a, b, router = a.detach(), b.detach(), part.R.detach()
    for i in range(2):
        for t in range(5):
            z = a @ x[i, t]
            p = (router @ z).softmax(0)
            same(got[i, t], sum(p[e] * (z @ b[e]) for e in range(4)))
    vn.settle(model, [inputs], keep=1)
    vn.save(model, tmp_path / "a")
    again = build("llama")
    vn.load(again, tmp_path / "a")
    assert torch.equal(look(again, inputs), look(model, inputs))


# -- AdaMSS -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_adamss(kind: str) -> None:
    """The clusters that PEFT finds, and the same function of them; with and without a bias."""
    theirs = shaken(build(kind), peft.AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=LLAMA))

    def copy(part: Any, layer: Any) -> None:
        assert torch.equal(part.rows.long().argsort(), layer.scatter_index["default"])
        torch.testing.assert_close(part.V, layer.adamss_newB["default"])
        for mine, other in ((part.A, layer.adamss_A), (part.B, layer.adamss_B)):
            for p, q in zip(mine, other["default"], strict=True):
                p.copy_(q)

    same(*ours(vn.AdaMSS(8, subspaces=3, rank=2), theirs, copy, kind))


def test_adamss_starts_at_the_row_spaces_of_its_clusters() -> None:
    """By eigenvectors of the cluster's Gram matrix. (PEFT takes a randomised SVD of it, of no more vectors than it keeps.)"""
    for part in vn.attach(build("llama"), vn.AdaMSS(8, subspaces=3, rank=2)).parts:
        u, _, clusters = segmented(part.weight(), 8, 3, 0)
        for a, rows in zip(part.A, clusters, strict=True):
            top = torch.linalg.eigh(u[rows].T @ u[rows])[1][:, -len(a) :]
            torch.testing.assert_close(a.T @ a, top @ top.T, atol=1e-4, rtol=0)


def test_adamss_lets_the_least_important_subspaces_rest(tmp_path: Any) -> None:
    model, inputs = fresh("bert")
    total = 12
    adapter = vn.attach(model, vn.AdaMSS(8, subspaces=3, target=4, warmup=0.1, final=0.5, every=2))
    whole = sum(len(p.A) for p in adapter.parts)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05)  # with momentum, and weights that decay
    counts, then = [], None
    for step in range(1, total + 1):
        optimiser.zero_grad()
        loss(model, inputs).backward()
        optimiser.step()
        vn.advance(model, step, total)
        counts.append(sum(int(p.live.sum()) for p in adapter.parts))
        if step == 6:
            then = [[t.detach().clone() for t in (*p.A, *p.B)] for p in adapter.parts]
    assert counts[0] == whole and counts == sorted(counts, reverse=True) and counts[5] == counts[-1] == 4
    for part, before in zip(adapter.parts, then, strict=True):
        for i, t in enumerate((*part.A, *part.B)):
            assert torch.equal(t, before[i]) != bool(part.live[i % len(part.A)])
    vn.save(model, tmp_path / "a")
    again = build("bert")
    loaded = vn.load(again, tmp_path / "a")
    assert sum(int(p.live.sum()) for p in loaded.parts) == 4 and torch.equal(look(again, inputs), look(model, inputs))


def test_adamss_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    model = build("llama")
    with refuses(vn.CapabilityError, "scikit-learn, which is not installed", r"veneer\[clusters\]", model=model):
        vn.attach(model, vn.AdaMSS(8))


# -- FRoD ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1])
def test_frod(share: float) -> None:
    """Few entries are gathered, many are not."""
    theirs = shaken(build("llama"), peft.FrodConfig(target_modules=LLAMA, sparse_rate=share, progressbar=False))

    def copy(part: Any, layer: Any) -> None:
        v, (rows, cols) = layer.frod_V["default"], layer.frod_s_indices["default"]
        torch.testing.assert_close(part.shared("V"), v)
        torch.testing.assert_close(part.U, layer.frod_U["default"])
        part.shared("index").copy_(rows * part.site.inp + cols)
        part.d.copy_(layer.frod_lambda_l["default"] - torch.linalg.solve(v.double(), part.weight().double().T).norm(dim=1))
        part.S.copy_(layer.frod_lambda_s_values["default"])

    same(*ours(vn.FRoD(share), theirs, copy))


def test_frods_basis_gives_every_map_of_a_kind_back(tmp_path: Any) -> None:
    model, inputs = fresh("bert")
    adapter = vn.attach(model, vn.gated(vn.FRoD(0.05, at="ffn")))
    bank, *parts = shake(adapter).parts
    assert sorted(n for n, _ in bank.named_buffers() if n[0] == "V") == ["V_intermediate_dense__32", f"V_output_dense__{parts[1].site.inp}"]
    for part in parts:
        length = torch.linalg.solve(part.shared("V"), part.weight().T).norm(dim=1)
        torch.testing.assert_close((part.U * length) @ part.shared("V").T, part.weight(), atol=1e-4, rtol=1e-4)
        off = part.shared("index").long()
        assert len(off) == len(part.S) and len(off.unique()) == len(off) and bool((off // part.site.inp != off % part.site.inp).all())
    vn.save(model, tmp_path / "a")
    assert not any(k.endswith(".U") for k in load_file(weights_of(tmp_path / "a")))  # made again, and not saved
    again = build("bert")
    vn.load(again, tmp_path / "a")
    assert torch.equal(look(again, inputs), look(model, inputs))
    vn.settle(model, [inputs], keep=1)
    vn.save(model, tmp_path / "settled")
    again = build("bert")
    vn.load(again, tmp_path / "settled")
    assert torch.equal(look(again, inputs), look(model, inputs))


def test_frods_u_follows_a_checkpoints_basis() -> None:
    """A basis of other signs, as another machine may make it; U must not stay with the one that was attached."""
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.FRoD(0.05)))
    with torch.no_grad():
        for name, v in adapter.parts[0].named_buffers():
            if name.startswith("V_"):
                v[:, ::2] *= -1
        for part in adapter.parts:
            part.derive()
    again = build("llama")
    vn.attach(again, vn.FRoD(0.05))
    fill_with(again, "default", {k: t.detach().clone() for k, t in tensors_in(model, "default").items()}, "here")
    assert torch.equal(look(again, inputs), look(model, inputs))


# -- regimes ------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every input's .grad, also where it has none
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_compile_without_graph_breaks_checkpoint_and_cast(kind: str) -> None:
    model, inputs = fresh(kind)
    inputs |= {"use_cache": False} if kind == "llama" else {}
    plan = vn.PSOFT(4, at="attn.q") + vn.PEANuT(3, layers=1, activation="gelu", at="attn.k") + vn.DEFT(2, at="attn.v") + vn.OSF(0.8, at="attn.o")
    plan += vn.GLoRA(2, at="attn.o") + vn.Lily(3, stride=2, at="ffn.up") + vn.AdaMSS(8, subspaces=3, at="ffn.down") + vn.FRoD(0.01, at="attn.q")
    adapter = shake(vn.attach(model, plan), scale=0.02)
    plain = look(model, inputs)
    loss(model, inputs).backward()
    expected = grads(adapter)

    def gradients_are_as_before() -> None:
        model.zero_grad()
        loss(model, inputs).backward()
        now = grads(adapter)
        assert now.keys() == expected.keys()
        for n, g in now.items():
            torch.testing.assert_close(g, expected[n], atol=1e-4, rtol=1e-3, msg=n)

    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients_are_as_before()
    model.gradient_checkpointing_disable()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(look(model, inputs).float(), plain, atol=0.05, rtol=0.05)
    torch._dynamo.reset()
    layer = (model.bert.encoder.layer if kind == "bert" else model.model.layers)[0]
    layer.compile(backend="aot_eager", fullgraph=True)
    same(look(model, inputs), plain)
    gradients_are_as_before()
    torch._dynamo.reset()
    with torch.no_grad():
        half, _ = fresh(kind)
        shake(vn.attach(half.bfloat16(), plan), scale=0.02)
        assert torch.isfinite(look(half, inputs)).all()


# -- options ------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda: vn.PSOFT(4, constrain=0.5), "constrain=0.5 is a positive bound for a series", "series=5"),
    (lambda: vn.PSOFT(4, series=2), "2 terms are not enough", "series=5"),
    (lambda: vn.PSOFT(4, orthogonal=False, series=5), "a free matrix has no series", "orthogonal=True"),
    (lambda: vn.PSOFT(4, niter=0), "niter must be", ""),
    (lambda: vn.DEFT(4, projection="svd"), "projection is 'svd'", "qr"),
    (lambda: vn.DEFT(4, alpha=0), "alpha=0 puts nothing in", "inject=False"),
    (lambda: vn.GLoRA(ab="matrix"), "ab is 'matrix'", "vector"),
    (lambda: vn.GLoRA(ab="none", c="none", de="none"), "nothing is left to train", "ab='vector'"),
    (lambda: vn.OSF(1.5), "keep is 1.5", "as 0.5"),
    (lambda: vn.OSF(0), "keep is 0", "as 64"),
    (lambda: vn.Lily(4, per="row"), "per is 'row'", "batch"),
    (lambda: vn.AdaMSS(8, warmup=0.6), "warmup=0.6 leaves no steps before final=0.5", "under final"),
    (lambda: vn.AdaMSS(8, threshold=1.0), "threshold must be", ""),
    (lambda: vn.FRoD(1.0), "share must be", ""),
    (lambda: vn.FRoD(ridge=0), "ridge=0 is not positive", "1e-3"),
    (lambda: vn.PEANuT(4, layers=-1), "layers must be", ""),
    (lambda: vn.PEANuT(4, activation="sine"), "activation is 'sine'", "silu"),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()


@pytest.mark.parametrize("method", [vn.PSOFT(99), vn.PEANuT(99)], ids=str)
def test_ranks_that_do_not_fit(method: vn.Plan) -> None:
    model = build("llama")
    with refuses(vn.PlanError, "rank 99 is over the rank", "or less", model=model):
        vn.attach(model, method)


def test_maps_that_do_not_fit() -> None:
    model = build("llama")
    with refuses(vn.PlanError, "r=99 is over the 32 outputs", "r=32", model=model):
        vn.attach(model, vn.DEFT(99))
    with refuses(vn.PlanError, "keep=40 trains none of the", "Keep 1 to 31", model=model):
        vn.attach(model, vn.OSF(40, at="attn.q"))
    with refuses(vn.PlanError, "keeps none", model=model):
        vn.attach(model, vn.OSF(0.001))
    with refuses(vn.PlanError, "change a bias, and this map has none", "ab='vector'", model=model):
        vn.attach(model, vn.GLoRA(ab="none"))
    model = build("convnext")
    with refuses(vn.PlanError, "grouped convolution", "Leave it out", model=model):
        vn.attach(model, vn.DEFT(2, at="all"))
