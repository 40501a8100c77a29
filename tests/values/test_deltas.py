"""Values of the reparameterisations: PEFT's logits with the same tensors, and the papers' equations written out."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer as vn
from helpers import build, fresh, look, loss, refuses, shake
from test_peft_format import logits, shaken
from zoo import ZOO

LLAMA = ["q_proj", "v_proj"]


def ours(plan: Any, theirs: Any, copy: Any, kind: str = "llama") -> tuple[Tensor, Tensor]:
    """Logits here and there, after `copy(part, layer)` has put PEFT's tensors into each part; then merged on both sides."""
    inputs = ZOO[kind].inputs(2, 7)
    model = build(kind)
    base = look(model, inputs)
    adapter = vn.attach(model, plan)
    with torch.no_grad():
        for part in adapter.parts:
            if part.site.path:
                copy(part, theirs.base_model.model.get_submodule(part.site.path))
    a, b = look(model, inputs), logits(theirs, inputs)
    assert not torch.allclose(a, base, atol=1e-3)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), a, atol=1e-4, rtol=1e-4)
    return a, b


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)


def take(*pairs: tuple[str, str]) -> Any:
    """Copies PEFT's tensors by name, ours first."""

    def copy(part: Any, layer: Any) -> None:
        for mine, theirs in pairs:
            own = getattr(part, mine)
            own.copy_(getattr(layer, theirs)["default"].reshape(own.shape))

    return copy


HADA = take(("A1", "hada_w1_b"), ("B1", "hada_w1_a"), ("A2", "hada_w2_b"), ("B2", "hada_w2_a"))


def kron(part: Any, layer: Any) -> None:
    for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"):
        own = getattr(layer, f"lokr_{name}")
        assert hasattr(part, name) == ("default" in own)
        if hasattr(part, name):
            getattr(part, name).copy_(own["default"])


def spectrum(part: Any, layer: Any) -> None:
    rows, cols = part.located()
    assert torch.equal(torch.stack([rows, cols]), layer.indices["default"])
    part.c.copy_(layer.fourierft_spectrum["default"])


def rotation(sign: float) -> Any:
    def copy(part: Any, layer: Any) -> None:
        part.Q.copy_(sign * layer.oft_R["default"].weight)

    return copy


def butterfly(part: Any, layer: Any) -> None:
    if hasattr(part, "Q"):
        a = layer.boft_R["default"]
        rows, cols = torch.triu_indices(a.shape[-1], a.shape[-1], 1)
        part.Q.copy_(((a.transpose(-1, -2) - a) / 2)[..., rows, cols])  # PEFT's skew has the other sign
    else:
        part.s.copy_(layer.boft_s["default"].flatten())


def granular(part: Any, layer: Any) -> None:
    a, b = layer.gralora_A["default"], layer.gralora_B["default"]  # (n, in/k, j s), (j, n s, out/k)
    part.A.copy_(a.unflatten(2, (part.k, -1)).permute(0, 2, 3, 1))
    part.B.copy_(b.unflatten(1, (part.k, -1)))


CASES: dict[str, tuple[Any, Any, Any]] = {
    "loha": (lambda: vn.LoHa(3, alpha=5), lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LLAMA), HADA),
    "loha-dense": (lambda: vn.LoHa(8), lambda: peft.LoHaConfig(r=8, alpha=8, target_modules=LLAMA), HADA),
    "lokr": (lambda: vn.LoKr(2, alpha=3), lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=LLAMA), kron),
    "lokr-factor": (lambda: vn.LoKr(8, factor=4), lambda: peft.LoKrConfig(r=8, alpha=8, decompose_factor=4, target_modules=LLAMA), kron),
    "lokr-both": (
        lambda: vn.LoKr(1, factor=8, decompose_both=True),
        lambda: peft.LoKrConfig(r=1, alpha=1, decompose_factor=8, decompose_both=True, target_modules=LLAMA),
        kron,
    ),
    "fourierft": (lambda: vn.FourierFT(40, scale=90), lambda: peft.FourierFTConfig(n_frequency=40, scaling=90, target_modules=LLAMA), spectrum),
    "c3a": (lambda: vn.C3A(8), lambda: peft.C3AConfig(block_size=8, target_modules=LLAMA), take(("w", "c3a_kernel"))),
    "miss": (lambda: vn.MiSS(5), lambda: peft.MissConfig(r=5, target_modules=LLAMA), take(("D", "miss_block"))),
    "miss-mini": (lambda: vn.MiSS(4, mini=8), lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=LLAMA), take(("D", "miss_block"))),
    **{
        f"road-{n}": (
            lambda n=n: vn.RoAd(variant=n, group=8, at="attn.{q,v}"),
            lambda n=n: peft.RoadConfig(variant=f"road_{n}", group_size=8, target_modules=LLAMA),
            take(("theta", "road_theta"), ("alpha", "road_alpha")),
        )
        for n in (1, 2, 4)
    },
    "oft": (lambda: vn.OFT(4), lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=LLAMA), rotation(-1)),
    "oft-series": (lambda: vn.OFT(4, series=5), lambda: peft.OFTConfig(oft_block_size=4, target_modules=LLAMA), rotation(1)),
    "oft-shared": (
        lambda: vn.OFT(8, shared=True),
        lambda: peft.OFTConfig(oft_block_size=8, block_share=True, use_cayley_neumann=False, target_modules=LLAMA),
        rotation(-1),
    ),
    "coft": (
        lambda: vn.OFT(4, constrain=0.3),
        lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=LLAMA),
        rotation(-1),
    ),
    "boft": (lambda: vn.BOFT(4), lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LLAMA), butterfly),
    "hra": (lambda: vn.HRA(4), lambda: peft.HRAConfig(r=4, target_modules=LLAMA), take(("U", "hra_u"))),
    "gralora": (lambda: vn.GraLoRA(4, alpha=6), lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LLAMA), granular),
    "delora": (
        lambda: vn.DeLoRA(2),
        lambda: peft.DeloraConfig(r=2, delora_lambda=15, target_modules=LLAMA),
        take(("A", "delora_A"), ("B", "delora_B"), ("bound", "delora_lambda")),
    ),
    "hira": (lambda: vn.HiRA(2), lambda: peft.HiraConfig(r=2, target_modules=LLAMA), take(("A", "hira_A"), ("B", "hira_B"))),
    "beft": (lambda: vn.BEFT(), lambda: peft.BeftConfig(target_modules=["v_proj"]), take(("delta", "beft_bias"))),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_pefts(case: str) -> None:
    plan, config, copy = CASES[case]
    same(*ours(plan(), shaken(build("llama"), config()), copy))


def test_butterflies_are_their_matrices() -> None:
    """M = (B_2 B_1)^T of the paper, with PEFT's permutations as dense matrices (it runs several factors on CUDA only)."""
    from peft.tuners.boft.layer import BOFTLayer

    lin = nn.Linear(16, 6, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(lin)
    w, b = lin.weight.detach().clone(), lin.bias.detach().clone()
    (part, gain) = shake(vn.attach(model, vn.BOFT(4, factors=2, at="all"))).parts
    layer = BOFTLayer(nn.Linear(16, 6))
    product = torch.eye(16, dtype=torch.float64)
    for i in range(2):
        p = layer.perm2mat(layer.block_butterfly_perm(16, 4 >> i, 2, 1)).double()
        q = torch.zeros(4, 4, 4, dtype=torch.float64)
        rows, cols = torch.triu_indices(4, 4, 1)
        q[:, rows, cols] = part.Q[i].detach()
        q = q - q.transpose(1, 2)
        one = torch.eye(4, dtype=torch.float64)
        product = p @ torch.block_diag(*((one + q) @ torch.linalg.inv(one - q))) @ p.t() @ product
    torch.testing.assert_close(product @ product.t(), torch.eye(16, dtype=torch.float64))
    assert (product.abs() > 1e-9).sum(1).min() > 4  # wider than one block
    torch.testing.assert_close(model(x), gain.s * (x @ product @ w.t()) + b)


@pytest.mark.parametrize("method", [vn.OFT(3, at="all"), vn.HRA(2, at="all"), vn.BOFT(3, at="all")], ids=str)
def test_a_rotated_convolution_starts_as_the_base_whatever_its_kernel(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, stride=2))
    x = torch.randn(2, 6, 9, 9)
    before = model(x).detach()
    adapter = vn.attach(model, method)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    shake(adapter)
    after = model(x).detach()
    assert not torch.allclose(after, before, atol=1e-2)
    vn.merge(model)
    torch.testing.assert_close(model(x), after, atol=1e-5, rtol=1e-5)
    with refuses(vn.PlanError, "grouped convolution"):
        vn.attach(nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), method)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("method", [vn.LoHa(2, at="linear"), vn.LoKr(2, at="linear"), vn.MiSS(4, at="linear"), vn.OFT(4, at="attn.{q,k,v}")], ids=str)
def test_slices_and_experts_merge(kind: str, method: Any) -> None:
    model, inputs = fresh(kind)
    shake(vn.attach(model, method))
    after = look(model, inputs)
    vn.merge(model)
    torch.testing.assert_close(look(model, inputs), after, atol=1e-4, rtol=1e-3)


def test_a_rotation_keeps_lengths() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    x = torch.randn(4, 8, dtype=torch.float64)
    for method in (vn.OFT(4, at="all"), vn.HRA(4, at="all"), vn.BOFT(4, factors=2, scale=False, at="all")):
        adapter = shake(vn.attach(model, method))
        torch.testing.assert_close(model(x).norm(dim=1), x.norm(dim=1))
        vn.detach(model, adapter.name)


def test_reflections_ask_to_be_apart() -> None:
    model, _ = fresh("llama")
    adapter = vn.attach(model, vn.HRA(2, orthogonal=0.5, at="attn.q@0"))
    torch.testing.assert_close(vn.penalty(model), torch.tensor(1.0))  # two equal vectors: 0.5 · (1 + 1)
    with torch.no_grad():
        adapter.parts[0].U.copy_(torch.eye(32)[:, :2])
    torch.testing.assert_close(vn.penalty(model), torch.tensor(0.0))


@pytest.mark.parametrize("method", [vn.LoHa(2), vn.LoKr(2), vn.FourierFT(20), vn.C3A(8), vn.MiSS(4), vn.RoAd(group=8), vn.GraLoRA(4), vn.DeLoRA(2), vn.HiRA(2)])
def test_a_constant_folds_into_the_parameters(method: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(3, 16)
    base = model(x).detach()
    adapter = shake(vn.attach(model, type(method)(**{**vars(method), "at": "all"})))
    d = model(x).detach() - base
    assert d.abs().max() > 1e-3
    assert all(p.scale_by(0.3) for p in adapter.parts)
    torch.testing.assert_close(model(x) - base, 0.3 * d, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (vn.C3A(5), "block=5 does not divide the 32 x 32.*Blocks that do"),
        (vn.OFT(5), "block=5 does not divide the 32 inputs.*Blocks that do"),
        (vn.BOFT(32, factors=2), "block=64 does not divide"),
        (vn.RoAd(group=5), "group of 5 is odd"),
        (vn.MiSS(33), "over the 32 inputs"),
        (vn.MiSS(4, mini=5), "mini=5 does not divide"),
        (vn.FourierFT(5000), "over the 1024 entries"),
        (vn.GraLoRA(9, k=3), "k=3 does not divide"),
        (vn.HiRA(33), "rank"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(method: Any, text: str, base: Any) -> None:
    with refuses(vn.PlanError, text, model=base):
        vn.attach(base, type(method)(**{**vars(method), "at": "attn.q"}))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: vn.HRA(3), "r=3 is odd.*r=4"),
        (lambda: vn.OFT(1), "block of 1"),
        (lambda: vn.OFT(constrain=-1.0), "nothing to learn"),
        (lambda: vn.OFT(series=2), "2 terms"),
        (lambda: vn.BOFT(3, factors=2), "even"),
        (lambda: vn.RoAd(variant=3), "variant is 1, 2 or 4"),
        (lambda: vn.GraLoRA(5), "not a multiple"),
        (lambda: vn.LoKr(factor=0), "factor"),
    ],
)
def test_wrong_options(make: Any, text: str) -> None:
    with refuses(vn.PlanError, text):
        make()


GATED = [
    vn.LoHa(2), vn.LoKr(2), vn.FourierFT(20), vn.C3A(8), vn.MiSS(4), vn.RoAd(group=8), vn.OFT(4), vn.BOFT(4), vn.HRA(2), vn.GraLoRA(4), vn.DeLoRA(2),
    vn.HiRA(2), vn.BEFT(), vn.NormTuning(), vn.LastLayers(1), vn.Magnitude(0.05), vn.LotteryTicket(0.05), vn.TrainableTokens((5, 40, 71)),
]  # fmt: skip


@pytest.mark.parametrize("method", GATED, ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_gate_scales_the_deviation(kind: str, method: Any) -> None:
    """g = 1 is the method without a gate, g = 0 the base; in between the gate learns."""
    model, inputs = fresh(kind)
    inputs["input_ids"][:, :2] = torch.tensor([5, 40])
    base = look(model, inputs)
    free = shake(vn.attach(model, method, name="free"))
    plain = look(model, inputs)
    gated = vn.attach(model, vn.gated(method), name="gated")
    torch.testing.assert_close(look(model, inputs), base, atol=1e-5, rtol=1e-4)
    own = {n: p for n, p in free.named_parameters()}
    with torch.no_grad():
        for n, p in gated.named_parameters():
            p.copy_(own[n]) if n in own else None
        for part in gated.parts:
            part.gate.bias.fill_(1e3)
    torch.testing.assert_close(look(model, inputs), plain, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for part in gated.parts:
            part.gate.bias.fill_(-1e3)
    torch.testing.assert_close(look(model, inputs), base, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for part in gated.parts:
            part.gate.bias.zero_()
    loss(model, inputs).backward()
    assert any(part.gate.bias.grad.abs() > 0 for part in gated.parts)
