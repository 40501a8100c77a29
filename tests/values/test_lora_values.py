"""LoRA's starts and options, DoRA and LoftQ: against peft where it has them, else against the equation written out."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer as vn
from helpers import build, fresh, look, loss, refuses, shake
from veneer.ops.rounding import nf4, nf4_levels

LINEAR = {"bert": ["query", "value", "dense"], "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_proj"]}
AT = {"bert": r"name:.*\.(query|value|dense)", "llama": r"name:.*\.(q_proj|v_proj|down_proj)", "gpt2": r"name:.*\.c_proj"}


def same(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def theirs(kind: str, **options: Any) -> Any:
    """peft's model on the same base."""
    torch.manual_seed(2)
    return peft.get_peft_model(build(kind), peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR[kind], fan_in_fan_out=kind == "gpt2", **options)).eval()


def ours(kind: str, method: Any, **data: Any) -> tuple[Any, vn.Adapter]:
    torch.manual_seed(3)
    model = build(kind)
    return model, vn.attach(model, method, **data)


def pairs(adapter: vn.Adapter, other: Any) -> Any:
    """Each of our parts with peft's layer at the same place."""
    for p in adapter.parts:
        yield p, other.get_submodule(f"base_model.model.{p.site.path}")


def logits_of(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# peft's OLoRA factors a Conv1D's matrix as it is stored, transposed
STARTS = [(k, i) for k in ("bert", "llama", "gpt2") for i in ("pissa", "olora", "mica") if (k, i) != ("gpt2", "olora")]


@pytest.mark.parametrize(("kind", "init"), STARTS)
def test_starts_are_pefts(kind: str, init: str) -> None:
    other = theirs(kind, init_lora_weights=init)
    model, adapter = ours(kind, vn.LoRA(4, init=init, at=AT[kind]))
    inputs = fresh(kind)[1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, layer in pairs(adapter, other):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # singular vectors have a sign that is free; B A, and each vector up to it, are not
            same(p.B @ p.A, b @ a)
            same(p.A.abs(), a.abs(), 1e-4)
            same(p.B.abs(), b.abs(), 1e-4)
            step = [torch.randn(t.shape, generator=generator) * 0.1 for t in (a, b)]
            for mine, their, d in zip((p.A, p.B), (a, b), step, strict=True):
                their.copy_(mine + d)
                mine.add_(d)
        same(look(model, inputs), logits_of(other(**inputs)), 2e-4)


def test_pissas_fast_start_is_the_exact_one_on_a_matrix_of_low_rank() -> None:
    model = build("llama")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "q_proj" in n:
                p.copy_(torch.randn(p.shape[0], 3) @ torch.randn(3, p.shape[1]))
    exact = vn.attach(model, vn.LoRA(3, init="pissa", at="attn.q"), name="a")
    fast = vn.attach(model, vn.LoRA(3, init="pissa", niter=16, at="attn.q"), name="b")
    for p, q in zip(exact.parts, fast.parts, strict=True):
        same(p.B @ p.A, q.B @ q.A, 1e-3)
        same(p.scale * p.B @ p.A, p.weight(), 1e-3)


def test_gaussian_rslora_and_patterns_are_pefts() -> None:
    other = theirs("llama", init_lora_weights="gaussian", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})
    model, adapter = ours("llama", vn.LoRA(4, alpha=8, init="gaussian", rank_stabilized=True, ranks={"attn.q": 2}, alphas={"ffn.down": 3}, at=AT["llama"]))
    shake(adapter)
    with torch.no_grad():
        for p, layer in pairs(adapter, other):
            assert p.scale == pytest.approx(layer.scaling["default"])
            layer.lora_A["default"].weight.copy_(p.A)
            layer.lora_B["default"].weight.copy_(p.B)
    inputs = fresh("llama")[1]
    with torch.no_grad():
        same(look(model, inputs), logits_of(other(**inputs)))
    assert vn.Plan.from_dict(adapter.plan.to_dict()) == adapter.plan


def test_default_scales() -> None:
    def scale(m: Any) -> float:
        return vn.attach(build("llama"), m).parts[0].scale

    assert scale(vn.LoRA(4)) == 2 and scale(vn.LoRA(4, rank_stabilized=True)) == 16 / math.sqrt(4)
    assert scale(vn.gated(vn.LoRA(4, rank_stabilized=True))) == 1
    assert vn.LoRA(4, alpha=1, rank_stabilized=True, ranks={"attn.q": 2}).ungated() == vn.LoRA(4, alpha=4, ranks={"attn.q": 2}, alphas={"attn.q": 2})


def test_lora_plus_and_lora_fa() -> None:
    model, adapter = ours("llama", vn.LoRA(2, b_rate=16.0))
    rates = {id(p): g["lr"] for g in vn.param_groups(model, 1e-3) for p in g["params"]}
    assert all(rates[id(p.B)] == 16e-3 and rates[id(p.A)] == 1e-3 for p in adapter.parts)
    model, adapter = ours("llama", vn.LoRA(2, freeze_a=True))
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"B"}
    assert all(p.A.abs().sum() > 0 for p in adapter.parts)


def test_eva_takes_the_leading_directions_and_deals_ranks_out() -> None:
    inputs = fresh("llama", batch=4, length=9)[1]
    plan = vn.LoRA(3, init="eva", at="linear")
    model, adapter = ours("llama", plan, batches=[inputs])
    seen: dict[str, Tensor] = {}
    base = build("llama")
    for p in adapter.parts:
        base.get_submodule(p.site.path).register_forward_pre_hook(lambda m, a, k=p.site.path: seen.__setitem__(k, a[0].flatten(0, -2)))
    look(base, inputs)
    shares = []
    for p in adapter.parts:
        _, s, v = torch.linalg.svd(seen[p.site.path], full_matrices=False)
        r = p.A.shape[0]
        same((p.A @ v[:r].T).abs(), torch.eye(r), 1e-3)
        shares += [(float(x), p.site.path, j) for j, x in enumerate((s**2 / (s**2).sum())[:6])]
    ranks = {p.site.path: p.A.shape[0] for p in adapter.parts}
    assert sum(ranks.values()) == 3 * len(ranks) and len(set(ranks.values())) > 1
    # nobody left out explains more than somebody taken, beyond the first of each map, which it always has
    taken = [x for x, path, j in shares if 0 < j < ranks[path]]
    left = [x for x, path, j in shares if j >= max(1, ranks[path])]
    assert min(taken) >= max(left) - 1e-5


def test_eva_without_dealing_keeps_its_ranks_and_needs_data() -> None:
    inputs = fresh("llama")[1]
    _, adapter = ours("llama", vn.LoRA(3, init="eva", rho=1.0, at="linear"), batches=[inputs])
    assert {p.A.shape[0] for p in adapter.parts} == {3}
    model = build("llama")
    with refuses(vn.PlanError, "looks at data", "batches", model=model):
        vn.attach(model, vn.LoRA(3, init="eva"))
    with refuses(vn.PlanError, "input vectors", "embedding", model=model):
        vn.attach(model, vn.LoRA(3, init="eva", at="embed"), batches=[inputs])


def square(out: Any) -> Tensor:
    return logits_of(out).float().square().mean()


def test_lora_ga_is_the_papers() -> None:
    """A and B are the gradient's singular vectors, and peft's span the same directions."""
    inputs = fresh("llama")[1]
    model, adapter = ours("llama", vn.LoRA(2, init="lora-ga", alpha=4), batches=[inputs], loss=square)
    base = build("llama")
    square(base(**inputs)).backward()
    for p in adapter.parts:
        g = base.get_submodule(p.site.path).weight.grad
        u, _, v = torch.linalg.svd(g)
        gamma = p.site.out**0.25 / 4
        same((p.A @ v[:2].T).abs(), gamma * torch.eye(2), 1e-3)
        same((p.B.T @ u[:, 2:4]).abs(), gamma * torch.eye(2), 1e-3)
    with refuses(vn.PlanError, "2 r = 18", "r=8", model=model):
        vn.attach(model, vn.LoRA(9, init="lora-ga"), name="b", batches=[inputs], loss=square)


def test_a_shifted_start_is_the_papers_residual_base() -> None:
    """Training s (B A - B0 A0) on W is training s B A on W - s B0 A0: the same output and gradients."""
    inputs = fresh("llama")[1]
    model, adapter = ours("llama", vn.LoRA(2, init="pissa"))
    shake(adapter)
    base = build("llama")
    with torch.no_grad():
        for p in adapter.parts:
            base.get_submodule(p.site.path).weight.sub_(p.scale * p.B0 @ p.A0)
    plain = vn.attach(base, vn.LoRA(2))
    with torch.no_grad():
        for p, q in zip(adapter.parts, plain.parts, strict=True):
            q.A.copy_(p.A)
            q.B.copy_(p.B)
    same(look(model, inputs), look(base, inputs), 2e-5)
    for m in (model, base):
        loss(m, inputs).backward()
    for p, q in zip(adapter.parts, plain.parts, strict=True):
        same(p.A.grad, q.A.grad, 1e-4)
        same(p.B.grad, q.B.grad, 1e-4)


# -- DoRA ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_dora_is_pefts(kind: str) -> None:
    other = theirs(kind, use_dora=True)
    model, adapter = ours(kind, vn.DoRA(4, alpha=8, at=AT[kind]))
    with torch.no_grad():
        for p, layer in pairs(adapter, other):
            same(p.m, layer.lora_magnitude_vector["default"].weight)
    shake(adapter)
    names = {}
    with torch.no_grad():
        for p, layer in pairs(adapter, other):
            names[p] = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
            for mine, their in zip((p.A, p.B, p.m), names[p], strict=True):
                their.copy_(mine)
    inputs = fresh(kind)[1]
    with torch.no_grad():
        same(look(model, inputs), logits_of(other(**inputs)))
    square(model(**inputs)).backward()
    square(other(**inputs)).backward()
    for p, their in names.items():
        for mine, t in zip((p.A, p.B, p.m), their, strict=True):
            same(mine.grad, t.grad, 1e-6)


def test_dora_on_embeddings_is_pefts() -> None:
    torch.manual_seed(0)
    other = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], use_dora=True)).eval()
    model, adapter = ours("llama", vn.DoRA(4, alpha=8, at="embed"))
    shake(adapter)
    (p,) = adapter.parts
    layer = other.get_submodule(f"base_model.model.{p.site.path}")
    with torch.no_grad():
        layer.lora_embedding_A["default"].copy_(p.A)
        layer.lora_embedding_B["default"].copy_(p.B)
        layer.lora_magnitude_vector["default"].weight.copy_(p.m)
        inputs = fresh("llama")[1]
        same(look(model, inputs), logits_of(other(**inputs)))


def test_doras_norm_is_that_of_the_dense_matrix() -> None:
    for kind in ("mixtral", "vit", "gpt2"):
        model = build(kind)
        adapter = shake(vn.attach(model, vn.DoRA(2, at="all")))
        for p in adapter.parts:
            a, b = (t.detach() for t in p.pair())
            w = p.weight()
            dense = (w + p.scale * b @ a).norm(dim=-1)
            torch.testing.assert_close(p.m.detach() / dense, p.gains(a, b).detach(), atol=1e-4, rtol=1e-4)


def test_dora_takes_loras_options() -> None:
    plan = vn.DoRA(4, init="pissa", ranks={"attn.q": 2}, rank_stabilized=True, b_rate=4.0)
    assert vn.Plan.from_dict(plan.to_dict()) == plan
    adapter = vn.attach(build("llama"), plan)
    assert {p.A.shape[0] for p in adapter.parts} == {2, 4}


class Packed(torch.nn.Module):
    """A linear whose weight is codes."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.q = nf4(linear.weight.detach())
        self.weight = torch.nn.Parameter((self.q * 0).to(torch.uint8), requires_grad=False)
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.q, self.bias)


def pack(model: Any, parts: list[Any]) -> Any:
    """The model with codes in place of the weights that `parts` act on."""
    for p in parts:
        path, _, name = p.site.path.rpartition(".")
        setattr(model.get_submodule(path), name, Packed(model.get_submodule(p.site.path)))
    return model


def test_dora_on_codes_is_dora_on_what_they_stand_for() -> None:
    """The norm of a packed base comes from r answers of the module a step, never from its matrix."""
    inputs = fresh("bert")[1]
    model, adapter = ours("bert", vn.DoRA(3))
    plain, packed = build("bert"), pack(build("bert"), adapter.parts)
    with torch.no_grad():
        for p in adapter.parts:
            plain.get_submodule(p.site.path).weight.copy_(packed.get_submodule(p.site.path).q)
    both = []
    for m in (plain, packed):
        torch.manual_seed(4)
        both.append(shake(vn.attach(m, vn.DoRA(3))))
    counts: list[int] = []
    for p in both[1].parts:
        assert p.packed
        p.weight = lambda: counts.append(1)
    same(look(packed, inputs), look(plain, inputs))
    for m in (plain, packed):
        loss(m, inputs).backward()
    for p, q in zip(*(b.parts for b in both), strict=True):
        for mine, their in zip(p.parameters(), q.parameters(), strict=True):
            same(mine.grad, their.grad)
    assert not counts


# -- LoftQ --------------------------------------------------------------------------------------------------------------
def test_nf4_has_the_published_levels() -> None:
    """The table of QLoRA's appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(torch.tensor(nf4_levels()), torch.tensor(published), atol=1e-6, rtol=0)
    w = torch.randn(3, 64) * torch.tensor([[1.0], [10.0], [0.1]])
    q = nf4(w)
    levels = torch.tensor(published)
    for row, got in zip(w, q, strict=True):
        top = row.abs().max()
        nearest = levels[(row[:, None] / top - levels).abs().argmin(1)] * top
        torch.testing.assert_close(got, nearest)


@pytest.mark.parametrize("quantiser", ["nf4", "int4", "int8"])
def test_loftq_starts_nearer_to_the_base_than_its_quantisation(quantiser: str) -> None:
    from veneer.ops.rounding import ROUNDINGS

    inputs = fresh("llama")[1]
    model, adapter = ours("llama", vn.LoftQ(8, quantiser=quantiser, at="linear"))
    base, rounded = build("llama"), build("llama")
    with torch.no_grad():
        for p in adapter.parts:
            w = p.weight()
            q = ROUNDINGS[quantiser](w)
            _, s, _ = torch.linalg.svd(w - q)
            left = w - q - p.scale * p.B @ p.A
            same(left.norm(), s[8:].norm(), 1e-4)  # Eckart and Young: the best there is
            rounded.get_submodule(p.site.path).weight.copy_(q)
    exact = look(base, inputs)
    assert (look(model, inputs) - exact).norm() < (look(rounded, inputs) - exact).norm()


def test_a_loftq_file_fits_the_quantised_base(tmp_path: Any) -> None:
    """What was trained on the simulated base is the same function on a base that is Q(W) itself."""

    inputs = fresh("llama")[1]
    model, adapter = ours("llama", vn.LoftQ(4, at="attn.{q,v}"))
    shake(adapter)
    vn.save(model, tmp_path / "a")
    quantised = pack(build("llama"), adapter.parts)
    with refuses(vn.CapabilityError, "quantised already", "load it here", model=quantised):
        vn.attach(quantised, vn.LoftQ(4, at="attn.{q,v}"), name="b")
    loaded = vn.load(quantised, tmp_path / "a", check_base=False)
    assert all(p.shift is None for p in loaded.parts)
    same(look(quantised, inputs), look(model, inputs))


# -- errors -------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda: vn.LoRA(4, init="pisa"), "init is 'pisa'", "'pissa'"),
    (lambda: vn.LoRA(4, ranks={"attn.q": 0}), "ranks is", "patterns and numbers"),
    (lambda: vn.LoRA(4, alphas={}), "alphas is", "patterns and numbers"),
    (lambda: vn.LoRA(4, b_rate=0), "b_rate must be positive", ""),
    (lambda: vn.LoRA(4, rho=0.5), "rho at least 1", ""),
    (lambda: vn.LoRA(4, niter=0), "niter must be", ""),
    (lambda: vn.LoRA(4, init="mica", freeze_a=True), "nothing is left to train", ""),
    (lambda: vn.LoftQ(4, quantiser="nf3"), "quantiser is 'nf3'", "nf4"),
    (lambda: vn.LoftQ(4, init="pissa"), "init is 'pissa'", "loftq"),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()


def test_patterns_must_match_and_an_odd_rank_has_no_halves() -> None:
    model = build("llama")
    with refuses(vn.SiteError, "'attn.w' matches nothing", model=model):
        vn.attach(model, vn.LoRA(4, ranks={"attn.w": 2}))
    with refuses(vn.PlanError, "3 is odd", "r=4", model=model):
        vn.attach(model, vn.LoRA(3, init="orthogonal"))
    with refuses(vn.PlanError, "over the rank", model=model):
        vn.attach(model, vn.LoRA(4, ranks={"attn.q": 999}))


@pytest.mark.parametrize("init", ["pissa", "mica", "orthogonal"])
def test_starts_in_pefts_format_are_for_the_original_base(init: str, tmp_path: Any) -> None:
    inputs = fresh("llama")[1]
    model, adapter = ours("llama", vn.LoRA(4, init=init, rank_stabilized=True, ranks={"attn.q": 2}, at="attn.{q,v}"))
    shake(adapter)
    vn.save(model, tmp_path / "a", format="peft")
    other = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "a")).eval()
    with torch.no_grad():
        same(look(model, inputs), other(**inputs).logits)
    again = build("llama")
    vn.load(again, tmp_path / "a")
    same(look(again, inputs), look(model, inputs))
    factors = {p.A.shape[0] for p in vn.Adapter(again, "default").parts}
    assert factors == ({4, 8} if init == "pissa" else {2, 4})


def test_fused_products_take_every_low_rank_part_and_no_other() -> None:
    inputs = fresh("llama")[1]
    for method, fused in ((vn.LoRA(4, init="pissa"), True), (vn.VeRA(4), True), (vn.DoRA(4), True), (vn.LoftQ(4), False)):
        model = build("llama")
        adapter = shake(vn.attach(model, method))
        plain = look(model, inputs)
        loss(model, inputs).backward()
        expected = {n: p.grad.clone() for n, p in adapter.named_parameters()}
        model.zero_grad()
        vn.optimize(model)
        same(look(model, inputs), plain, 2e-5)
        loss(model, inputs).backward()
        for n, p in adapter.named_parameters():
            same(p.grad, expected[n], 1e-4)
        hosts = [h for h in model.__dict__["_veneer_state"].hosts.values() if h.recipe and h.recipe.outputs]
        assert hosts and all((h.recipe.bundle is not None) == fused for h in hosts), method
