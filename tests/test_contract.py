"""The contract: every method on every kind of model, one tolerance."""

from __future__ import annotations

import copy

import pytest
import torch

import veneer as vn
from catalogue import CATALOGUE, REFUSALS, REPRESENTATIVE
from zoo import ZOO, loss, main, output

ATOL = 1e-5

METHODS = {
    "lora": lambda: vn.LoRA(4, at="linear"),
    "lora-all": lambda: vn.LoRA(2, at="all"),
    "ia3": lambda: vn.IA3(at="linear"),
    "ia3-in": lambda: vn.IA3(at="linear", on="input"),
    "bitfit": lambda: vn.BitFit(),
    "full-norm": lambda: vn.Full(at="norm"),
    "full-head": lambda: vn.Full(at="head"),
    "bottleneck": lambda: vn.Bottleneck(4, activation="gelu", at="all"),
    "parallel": lambda: vn.Bottleneck(4, parallel=True, activation="tanh", scale="learnt", norm=True, at="all"),
    "prefix": lambda: vn.Prefix(3, at="all"),
    "prefix-mlp": lambda: vn.Prefix(3, reparameterize=5),
    "prompt": lambda: vn.PromptTuning(3),
    "gated-lora": lambda: vn.gated(vn.LoRA(4, at="linear")),
    "gated-bitfit": lambda: vn.gated(vn.BitFit()),
    "gated-token": lambda: vn.gated(vn.Bottleneck(4, activation="swish", at="all"), per="token"),
    "gated-constant": lambda: vn.gated(vn.LoRA(4, at="linear"), per="constant"),
    "gated-prefix": lambda: vn.gated(vn.Prefix(3)),
    "gated-published": lambda: vn.gated(vn.Prefix(3), gate="published"),
    "unipelt": lambda: vn.gated(vn.Bottleneck(4, activation="gelu", at="all") + vn.Prefix(3, at="all") + vn.LoRA(4, at="linear")),
}
ALL_METHODS = METHODS | CATALOGUE


def cases():
    for kind in ZOO:
        for method in METHODS:
            yield pytest.param(kind, method, id=f"{kind}-{method}")
    for kind in REPRESENTATIVE:
        for method in CATALOGUE:
            yield pytest.param(kind, method, id=f"{kind}-{method}")


def test_every_method_is_under_the_contract() -> None:
    here = {type(m) for make_plan in ALL_METHODS.values() for m in make_plan().leaves()}
    assert here == {record.cls for record in vn.methods()}


def make(name: str):
    torch.manual_seed(0)
    model = ZOO[name].build().eval()
    return model, ZOO[name].inputs(3, 7)


def fits(kind: str, plan) -> bool:
    return all(ZOO[kind].ports & set(m.ports) for m in plan.leaves())


def shake(adapter, scale: float = 0.1) -> None:
    """Move every parameter away from its start."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * scale)


def close(a, b, atol=ATOL):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def put(model, plan, name: str, inputs):
    """Attach, with data to look at where the plan's methods need some."""
    torch.manual_seed(1)
    data = {"batches": [inputs], "loss": total} if any(m.needs_data for m in plan.leaves()) else {}
    return vn.attach(model, plan, name=name, **data)


def total(out):
    """A scalar of a model's answer."""
    y = main(out).float()
    return (y * torch.linspace(-1.0, 1.0, y.numel()).reshape(y.shape)).sum()


def attach(kind: str, method: str):
    """The model with the plan attached, or the refusal that its missing port or bias must give."""
    plan = ALL_METHODS[method]()
    model, inputs = make(kind)
    try:
        adapter = put(model, plan, "a", inputs)
    except vn.SiteError as e:
        if not fits(kind, plan):
            assert "port" in str(e)
        else:
            assert "bias" in str(e) or "matches nothing" in str(e) or REFUSALS.get(method, "\n") in str(e), e
        assert not any("_veneer" in n for n, _ in model.named_modules())
        return None
    except vn.PlanError as e:
        assert "rank" in str(e) or "varies" in str(e) or REFUSALS.get(method, "\n") in str(e), e
        return None
    assert fits(kind, plan)
    return model, inputs, adapter, plan


@pytest.mark.parametrize(("kind", "method"), list(cases()))
def test_contract(kind: str, method: str, tmp_path) -> None:
    base, inputs = make(kind)
    frozen = make(kind)[0].requires_grad_(False)  # torch's own attention rounds otherwise where nothing needs a gradient
    with torch.no_grad():
        before, still = output(base, inputs), output(frozen, inputs)
    made = attach(kind, method)
    if made is None:
        return
    model, inputs, adapter, plan = made
    own = {n: p.detach().clone() for n, p in base.named_parameters()}

    # 1. the identity at the start
    with torch.no_grad():
        if all(m.identity_at_init for m in plan.leaves()):
            close(output(model, inputs), before)
        else:
            assert not torch.allclose(output(model, inputs), before, atol=1e-6)

    # 2. gradients: all of the adapter's within two steps, none of the base's
    touched = set()
    optimiser = torch.optim.SGD(list(adapter.parameters()), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        loss(model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), 10.0)
        for n, p in adapter.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                touched.add(n)
        for n, p in model.named_parameters():
            assert "_veneer" in n or p.grad is None, n
        optimiser.step()
    missing = {n for n, _ in adapter.named_parameters()} - touched
    assert not {n for n in missing if not dead(kind, n)}, sorted(missing)[:6]

    # 3. the base's own keys and values are as they were
    now = dict(model.named_parameters())
    for n, p in own.items():
        assert torch.equal(now[n], p), n

    # 5. disabled == base
    shake(adapter)
    with torch.no_grad():
        after = output(model, inputs)
        assert not torch.allclose(after, before, atol=1e-6)
        with vn.disabled(model):
            assert torch.equal(output(model, inputs), still)

        # 3. save, load on a fresh base: the same bits
        vn.save(model, tmp_path / "a", name="a")
        fresh, _ = make(kind)
        vn.load(fresh, tmp_path / "a", name="b")
        assert torch.equal(output(fresh, inputs), after)

        # 4. merge
        if all(m.mergeable for m in plan.leaves()) and not any(t.gate and t.gate.per != "constant" for t in plan.terms()):
            try:
                vn.merge(model, "a")
            except vn.MergeError as e:
                assert "cannot be had" in str(e) and kind in ("wav2vec2", "hubert")  # weight-normed convolution
            else:
                torch.testing.assert_close(output(model, inputs), after, atol=1e-4, rtol=1e-3)
                vn.unmerge(model)
                assert torch.equal(output(model, inputs), after)
        else:
            with pytest.raises(vn.CapabilityError):
                vn.merge(model, "a")

        # detach restores the base, bit for bit
        vn.detach(model, "a")
        assert torch.equal(output(model, inputs), before)
    assert type(model) is type(base)
    assert [n for n, _ in model.named_parameters()] == list(own)
    trainable = {n: p.requires_grad for n, p in base.named_parameters()}
    assert all(torch.equal(p, own[n]) and p.requires_grad == trainable[n] for n, p in model.named_parameters())
    assert all(kind_of(a) == kind_of(b) for a, b in zip(model.modules(), base.modules(), strict=True))


def kind_of(module):
    """Its class; torch's parametrisations make one for each module, so those go by their bases."""
    cls = type(module)
    return cls.__bases__ if hasattr(module, "parametrizations") else cls


def dead(kind: str, name: str) -> bool:
    """Parameters whose gradient is zero in the base too: they do not reach the output."""
    if kind in ("mixtral", "qwen2_moe") and "experts" in name:
        return True  # an expert that no token chose
    if "bitfit" in name and any(w in name for w in (".k_proj:", ".key:", ".k_lin:", ".key_proj:", ".k:", ".beta:")):
        return True  # attention does not change when all keys move together
    return any(w in name for w in ("pooler", "masked_spec", "mask_token"))


@pytest.mark.parametrize(("kind", "method"), list(cases()))
def test_route(kind: str, method: str) -> None:
    made = attach(kind, method)
    if made is None:
        return
    model, inputs, a, plan = made
    b = put(model, copy.deepcopy(plan), "b", inputs)
    shake(a, 0.1)
    shake(b, -0.2)
    with torch.no_grad():
        alone = {}
        for name in ("a", "b", None):
            vn.activate(model, name)
            alone[name] = output(model, inputs)
        try:
            with vn.route(model, ["a", "b", None]):
                mixed = output(model, inputs)
        except vn.VeneerError as e:
            if not all(m.routable for m in plan.leaves()):
                assert "cannot be routed" in str(e), e
                return
            # tables shared by all rows; towers without a mask
            assert method in ("prompt",) or any(getattr(m, "at", None) == "all" for m in plan.leaves()) or (kind == "deberta_v2" and "share" in str(e)), e
            return
        for row, name in enumerate(("a", "b", None)):
            if kind == "clip":  # images against texts: only the diagonal belongs to one row
                close(mixed[row, row], alone[name][row, row], 2e-5)
            else:
                close(mixed[row], alone[name][row], 2e-5)
        vn.activate(model, ["a", "b"])
        both = output(model, inputs)
        vn.activate(model, ["b", "a"])
        close(output(model, inputs), both)
