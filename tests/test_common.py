"""Adapters that train together: their tensors in common memory, each with its own gradient, and updated as it would be alone."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import veneer as vn
from test_many_adapters import batch, gradients, llama, real, stir

NAMES = ["a", "b", "c", "d"]


def alike(alphas=(4, 4, 4, 4), dropout=0.0, **kw):
    """Four adapters of one rank on all linears."""
    model = llama(**kw)
    for i, alpha in enumerate(alphas):
        torch.manual_seed(i)
        stir(vn.attach(model, vn.LoRA(3, alpha=alpha, dropout=dropout, at="linear"), name=NAMES[i]))
    return model.train()


def fast(model):
    vn.optimize(model, loss=False, compile=False)
    return model


def piles(model):
    return [c for like in model._veneer_state.shared.values() for c in (like.down, like.up) if c.stack is not None]


def lie_together(model):
    found = piles(model)
    return bool(found) and all(list(map(torch.Tensor.data_ptr, c.own)) == [v.data_ptr() for v in c.views(c.stack.detach())] for c in found)


def loss_of(model, inputs, rows):
    return (real(model(**inputs).logits, inputs) * torch.linspace(-1, 1, 50)).square().sum() / rows


def cut(inputs, which):
    return {k: v[which] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def inputs_of(step):
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(step))
    return {**batch(), "input_ids": ids}


ROUTES = {
    "in order": lambda step: ["a", "b", "c", "d"],
    "in any order": lambda step: [NAMES[(i + step) % 4] for i in (2, 0, 3, 1)],
    "some at a time": lambda step: [NAMES[step % 4], None, NAMES[(step + 1 + step % 2) % 4], NAMES[step % 4]],
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("alphas", [(4, 4, 4, 4), (3, 6, 1, 2)], ids=["one scale", "scales"])
def test_twenty_steps_together_are_twenty_steps_alone(route, alphas):
    together, apart = fast(alike(alphas)), alike(alphas)
    ours = vn.adamw(together, lr=5e-3, weight_decay=0.1)
    theirs = {n: torch.optim.AdamW(list(vn.Adapter(apart, n).parameters()), lr=5e-3, weight_decay=0.1) for n in NAMES}
    before = {n: p.detach().clone() for n, p in together.named_parameters()}
    for step in range(20):
        inputs, rows = inputs_of(step), route(step)
        with vn.route(together, rows):
            loss_of(together, inputs, 4).backward()
        ours.step()
        ours.zero_grad()
        for name in dict.fromkeys(n for n in rows if n):
            vn.activate(apart, name)
            loss_of(apart, cut(inputs, [i for i, n in enumerate(rows) if n == name]), 4).backward()
            theirs[name].step()
            theirs[name].zero_grad()
    assert lie_together(together) and len(piles(together)) == 2 * 8
    moved = 0
    for (n, p), q in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
        moved += not torch.equal(p, before[n])
    assert moved == 4 * 14 * 2


@pytest.mark.parametrize("rows", [NAMES, ["d", "b", None, "d"]], ids=["all", "some"])
def test_gradients_are_those_of_autograd(rows):
    plain, ours = alike(dropout=0.3), fast(alike(dropout=0.3))
    found = []
    for model in (plain, ours):
        torch.manual_seed(1)
        with vn.route(model, rows):
            found.append(gradients(model, loss_of(model, batch(), 4)))
    assert lie_together(ours) and not piles(plain)
    assert found[0].keys() == found[1].keys()
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_however_they_come():
    plain, ours = alike(), fast(alike())
    for model in (plain, ours):
        with vn.route(model, NAMES):
            loss_of(model, inputs_of(0), 4).backward()
            loss_of(model, inputs_of(1), 4).backward()  # onto gradients that lie together
        with vn.route(model, ["b", "a", "b", None]):
            loss_of(model, inputs_of(2), 4).backward()
        vn.activate(model, "c")
        loss_of(model, inputs_of(3), 4).backward()  # each to its own
        with vn.route(model, NAMES):
            first = loss_of(model, inputs_of(4), 4)
            with vn.route(model, ["a", "a", "d", "d"]):
                second = loss_of(model, inputs_of(5), 4)
        (first + second).backward()
        model.zero_grad(set_to_none=False)
        with vn.route(model, NAMES):
            loss_of(model, inputs_of(6), 4).backward()
    for (n, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_gradients_that_someone_keeps_are_not_written_over():
    model = fast(alike())
    first = vn.Adapter(model, "b").parts[2].A
    other = vn.Adapter(model, "c").parts[0].B

    def step(i):
        with vn.route(model, NAMES):
            loss_of(model, inputs_of(i), 4).backward()

    step(0)
    kept, part = first.grad, other.grad.view(-1)
    want = kept.clone(), part.clone()
    model.zero_grad()
    step(1)
    assert torch.equal(kept, want[0]) and torch.equal(part, want[1]) and not torch.equal(first.grad, kept)
    del kept, part
    model.zero_grad()
    at = first.grad
    assert at is None
    step(2)
    place = first.grad.data_ptr()
    for i in (3, 4):  # nobody has them: the same memory again
        model.zero_grad()
        step(i)
        assert first.grad.data_ptr() == place
    alone = fast(alike())
    with vn.route(alone, NAMES):
        loss_of(alone, inputs_of(4), 4).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_a_frozen_adapter_gets_no_gradient_and_no_decay():
    model = fast(alike())
    optimizer = vn.adamw(model, lr=1e-2, weight_decay=0.5)
    held = [p for p in vn.Adapter(model, "b").parameters()]
    before = [p.detach().clone() for p in held]
    for frozen in (True, False):
        for p in held:
            p.requires_grad_(not frozen)
        with vn.route(model, NAMES):
            loss_of(model, batch(), 4).backward()
        assert all((p.grad is None) == frozen for p in held)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(p, q) == frozen for p, q in zip(held, before, strict=True))
    assert lie_together(model)


def test_on_a_base_in_half_precision():
    model = alike()
    half = fast(copy.deepcopy(model).bfloat16())
    exact = copy.deepcopy(model)
    with torch.no_grad():  # fp32 masters on a bf16 base, both of the same numbers
        for p, q in zip(half.parameters(), exact.parameters(), strict=True):
            q.copy_(p)
            if p.requires_grad:
                p.data = p.float()
    found = []
    for m in (half, fast(exact)):
        with vn.route(m, ["c", "a", "d", "b"]):
            found.append(gradients(m, loss_of(m, batch(), 4)))
    assert lie_together(half) and all(g.dtype == torch.float32 for g in found[0].values())
    errors = [(found[0][n] - g).norm() / g.norm() for n, g in found[1].items()]
    assert sum(errors) / len(errors) < 0.03


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_need_no_new_graph_for_other_rows_or_a_call_without_gradients():
    plain, ours, inputs = fast(alike()), alike(), batch()
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    vn.optimize(ours, loss=False, compile={"backend": count, "fullgraph": True})
    frames = []
    for _ in range(2):
        for rows in (NAMES, ["d", "b", "c", "a"], ["b", "c", "d", "a"]):
            both = []
            for m in (plain, ours):
                with vn.route(m, rows):
                    both.append(gradients(m, loss_of(m, inputs, 4)))
                    with torch.no_grad():
                        both.append({"logits": real(m(**inputs).logits, inputs)})
            for want, got in ((both[0], both[2]), (both[1], both[3])):
                for n, g in want.items():
                    torch.testing.assert_close(got[n], g, rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")
            frames.append(count.frame_count)
    assert lie_together(ours) and len(set(frames)) == 1


def step_of(model, rows=NAMES):
    with vn.route(model, rows):
        loss_of(model, batch(), 4).backward()


def test_who_waits_for_a_parameters_own_gradient_gets_it():
    model, seen = fast(alike()), []
    p = vn.Adapter(model, "c").parts[3].A
    handle = p.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad is not None))
    step_of(model)
    assert seen == [True] and len(piles(model)) == 2 * 7
    handle.remove()
    p.register_hook(lambda g: g * 2)
    before = p.grad.clone()
    p.grad = None
    step_of(model)
    torch.testing.assert_close(p.grad, 2 * before)


def test_under_ddp_every_parameter_has_its_own_gradient():
    plain, model = alike(), fast(alike())
    with vn.route(plain, NAMES):
        want = gradients(plain, loss_of(plain, batch(), 4))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        copies = nn.parallel.DistributedDataParallel(model)
        with vn.route(model, NAMES):
            loss_of(copies, batch(), 4).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert not piles(model)
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-6)


def test_memory_of_another_is_left_alone():
    model = fast(alike())
    own = [p for p in vn.Adapter(model, "a").parameters()]
    flat = torch.cat([p.detach().flatten() for p in own])
    for p, v in zip(own, flat.split([p.numel() for p in own]), strict=True):
        p.data = v.view(p.shape)
    step_of(model)
    assert not piles(model) and all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() and p.grad is not None for p in own)


def test_what_is_moved_exchanged_attached_or_detached_is_gathered_again(tmp_path):
    model = fast(alike())
    step_of(model)
    other = copy.deepcopy(model)
    assert not piles(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    vn.Adapter(model, "a").parts[0].A.data = torch.ones(3, 32)
    step_of(model)
    assert lie_together(model) and torch.equal(vn.Adapter(model, "a").parts[0].A, torch.ones(3, 32))
    vn.detach(model, "b")
    stir(vn.attach(model, vn.LoRA(3, at="linear"), name="e"))
    stir(vn.attach(model, vn.LoRA(2, at="linear"), name="f"))
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    step_of(model, ["e", "a", "d", None])
    assert lie_together(model) and {len(c.own) // c.maps for c in piles(model)} == {4}
    model.zero_grad()
    step_of(model, ["f", "a", "d", None])  # of another rank: not from common memory
    assert vn.Adapter(model, "f").parts[0].A.grad is not None
    for n, p in model.named_parameters():
        assert torch.equal(p, want[n])
    vn.save(model, tmp_path / "d", name="d")
    assert next((tmp_path / "d").glob("*.safetensors")).stat().st_size < 4 * sum(p.numel() for p in vn.Adapter(model, "d").parameters()) * 1.5
    fresh = llama()
    vn.load(fresh, tmp_path / "d")
    for p, q in zip(vn.Adapter(fresh, "d").parameters(), vn.Adapter(model, "d").parameters(), strict=True):
        assert torch.equal(p, q)
    vn.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), llama().parameters(), strict=True))


# -- the optimiser ----------------------------------------------------------------------------------------------------
def side_by_side(n=4, size=6):
    """n parameters in one tensor (not in its order), and one elsewhere."""
    flat = torch.randn(n, size, generator=torch.Generator().manual_seed(0))
    ps = [nn.Parameter(torch.empty(0)) for _ in range(n)]
    for p, v in zip(ps, flat, strict=True):
        p.data = v.view(2, -1)
    return [ps[i] for i in (2, 0, 3, 1)] + [nn.Parameter(torch.ones(3))]


def separately(n=4):
    return [nn.Parameter(p.detach().clone()) for p in side_by_side(n)]


def give(ps, step, missing=()):
    g = torch.Generator().manual_seed(step)
    grads = torch.randn(4, 2, 3, generator=g)
    for i, k in enumerate((2, 0, 3, 1)):
        ps[i].grad = None if i in missing else grads[k]
    ps[4].grad = torch.randn(3, generator=g)


def both():
    from veneer.neighbours import AdamW

    ours, plain = side_by_side(), separately()
    options = {"lr": 0.1, "weight_decay": 0.2, "fused": True}
    return ours, AdamW(ours, **options), plain, torch.optim.AdamW(plain, **options)


def same(ours, plain):
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_neighbours_are_updated_as_one(monkeypatch):
    ours, a, plain, b = both()
    counts = []
    update = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda ps, *r, **k: counts.append(len(ps)) or update(ps, *r, **k))
    versions = [p._version for p in ours]
    for step in range(3):
        for ps, o in ((ours, a), (plain, b)):
            give(ps, step)
            o.step()
    assert counts == [2, 5] * 3  # the four are one
    assert all(p._version > v for p, v in zip(ours, versions, strict=True))
    same(ours, plain)


def test_neighbours_with_and_without_gradients_keep_their_own_counts():
    ours, a, plain, b = both()
    for step, missing in enumerate([(), (1,), (0, 1, 2, 3), (2,), ()]):
        for ps, o in ((ours, a), (plain, b)):
            give(ps, step, missing)
            o.step()
    same(ours, plain)
    assert [float(a.state[p]["step"]) for p in ours] == [float(b.state[p]["step"]) for p in plain] == [4, 3, 3, 4, 5]


def test_state_goes_to_torchs_optimiser_and_back():
    ours, a, plain, b = both()
    for step in range(2):
        give(ours, step)
        a.step()
    with torch.no_grad():
        for p, q in zip(ours, plain, strict=True):
            q.copy_(p)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for ps, o in ((ours, a), (plain, b)):
        give(ps, 2)
        o.step()
    same(ours, plain)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for ps, o in ((ours, a), (plain, b)):
        give(ps, 3)
        o.step()
        o.param_groups[0]["lr"] = 0.01
        give(ps, 4)
        o.step()
    same(ours, plain)
    assert float(a.state[ours[0]]["step"]) == 5


def test_a_scaler_takes_a_step_back():
    ours, a, plain, b = both()
    for step, scale in enumerate((1.0, float("inf"), 2.0)):
        for ps, o in ((ours, a), (plain, b)):
            give(ps, step)
            o.found_inf, o.grad_scale = torch.tensor(float(scale == float("inf"))), torch.tensor(scale)
            o.step()
    same(ours, plain)
    assert [float(a.state[p]["step"]) for p in ours] == [2] * 5


def test_other_options_are_torchs():
    from veneer.neighbours import AdamW

    for options in ({"fused": False}, {"fused": True, "amsgrad": True}):
        ours, plain = side_by_side(), separately()
        optimizers = AdamW(ours, lr=0.1, **options), torch.optim.AdamW(plain, lr=0.1, **options)
        for step in range(3):
            for ps, o in zip((ours, plain), optimizers, strict=True):
                give(ps, step)
                o.step()
        same(ours, plain)
