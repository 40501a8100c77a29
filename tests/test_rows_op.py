"""Frozen linears with the low-rank deviations of many adapters: outputs and gradients as the plain form's, by torch and by the kernels."""

import importlib

import pytest
import torch
import transformers as tf

import veneer as vn
from test_many_adapters import NAMES, batch, gradients, mixed, real
from veneer.ops import gemv, rows, trust

INDEX = [1, 0, 2, 1]


def make(dtype, looked_up, outs=(6, 4, 5), n=8, inp=7, r=2):
    g = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    size = 3 if looked_up else 4
    x, a, b = (t.requires_grad_() for t in (new(n, inp), new(size, len(outs) * r, inp), new(size, sum(outs), r)))
    index = torch.tensor(INDEX) if looked_up else None
    each = [e for e in (INDEX if looked_up else range(4)) for _ in range(n // 4)]
    return x, a, b, [new(o, inp) for o in outs], [new(o) if i else None for i, o in enumerate(outs)], index, each


def both(ys, inputs):
    g = torch.Generator().manual_seed(1)
    loss = sum((y.double() * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in ys)
    return [*ys, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("outs", [(6,), (6, 4, 5)])
def test_equals_the_reference(outs, looked_up):
    x, a, b, ws, cs, index, each = make(torch.float32, looked_up, outs)
    plain = both(rows.reference(x, ws, cs, a, b, each), (x, a, b))
    for p, q in zip(both(rows.rows(x, ws, cs, a, b, index), (x, a, b)), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    half = [t.detach().bfloat16().requires_grad_() for t in (x, a, b)]
    wh, ch = [w.bfloat16() for w in ws], [c if c is None else c.bfloat16() for c in cs]
    exact = [t.detach().float().requires_grad_() for t in half]
    want = both(rows.reference(exact[0], [w.float() for w in wh], [c if c is None else c.float() for c in ch], *exact[1:], each), exact)
    for p, q in zip(both(rows.rows(half[0], wh, ch, *half[1:], index), half), want, strict=True):
        assert (p.float() - q).norm() / q.norm() < 1e-2


@pytest.mark.parametrize("looked_up", [False, True])
def test_gradcheck_with_another_input_and_an_unused_output(looked_up):
    x, a, b, ws, cs, index, _ = make(torch.float64, looked_up)
    assert torch.autograd.gradcheck(lambda x, a, b: tuple(rows.rows(x, ws, cs, a, b, index)), (x, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: tuple(rows.rows(x, ws, cs, a, b, index, dropped=x * 0.5)), (x, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: rows.rows(x, ws, cs, a, b, index)[1], (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # Triton's interpreter has no products in bf16
@pytest.mark.parametrize("looked_up", [False, True])
def test_kernels(monkeypatch, looked_up, dtype):
    kernels = pytest.importorskip("veneer.ops.rows_triton")
    for name, size in (("BM", 16), ("BN", 32), ("BK", 16)):
        monkeypatch.setattr(kernels, name, size)
    x, a, b, ws, cs, index, each = (t for t in make(dtype, looked_up, (40, 24, 8), n=64, inp=48, r=8))
    x, a, b = (t.detach() for t in (x, a, b))
    f = [t.float() for t in (x, a, b)]
    want = rows.reference(f[0], [w.float() for w in ws], [c if c is None else c.float() for c in cs], f[1], f[2], each)
    z = torch.stack([row @ a[e].t() for row, e in zip(x, each, strict=True)])
    near = 1e-5 if dtype == torch.float32 else 1e-2
    start = 0
    for i, (w, c) in enumerate(zip(ws, cs, strict=True)):
        y = kernels.augmented(x, w, c, z[:, 8 * i : 8 * i + 8], b, start, index)
        assert (y.float() - want[i]).norm() / want[i].norm() < near
        start += w.shape[0]
    gs, dz = [torch.randn(64, w.shape[0]).to(dtype) for w in ws], torch.randn(64, 24).to(dtype)
    dx = sum(g.float() @ w.float() for g, w in zip(gs, ws, strict=True)) + torch.stack([d @ f[1][e] for d, e in zip(dz.float(), each, strict=True)])
    assert (kernels.gathered(gs, ws, dz, a, index).float() - dx).norm() / dx.norm() < near


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("names", [["a", "b", "c", "d"], ["a", "d", None, "a"]])
def test_an_optimised_model_trains_as_a_plain_one(names, dropout):
    models = [mixed(dropout=dropout).train() for _ in range(2)]
    vn.optimize(models[1], loss=False, compile=False)
    inputs, found = batch(), []
    for model in models:
        torch.manual_seed(3)
        with vn.route(model, names):
            found.append(gradients(model, real(model(**inputs).logits, inputs).square().mean()))
    slots = models[1]._veneer_state.routings[0].slots
    assert len(slots) == 8 and all(s.products is not None for s in slots)
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_trained_and_other_linears_keep_their_own_product():
    model = mixed(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)))
    vn.optimize(model, compile=False)
    with vn.route(model, NAMES):
        model(**batch())
    assert model._veneer_state.routings[0].slots and all(s.products is None for s in model._veneer_state.routings[0].slots)


def test_kernels_are_tried_before_they_are_used(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(rows, "kernels", importlib.import_module("veneer.ops.rows_triton"))
    for module in (rows, gemv):
        monkeypatch.setattr(module, "trusted", False)
    for name, size in (("BM", 16), ("BN", 32), ("BK", 16)):
        monkeypatch.setattr(rows.kernels, name, size)
    cpu = torch.device("cpu")
    trust.tried.__wrapped__(cpu, torch.float16)
    assert rows.trusted and gemv.trusted
    for module in (rows, gemv):
        monkeypatch.setattr(module, "trusted", False)
    monkeypatch.setattr(gemv, "gemv", lambda x, a, b, *_: x.new_zeros(x.shape[0], b.shape[1]))
    monkeypatch.setattr(rows.kernels, "augmented", lambda *a: 1 / 0)
    with pytest.warns(UserWarning) as said:
        trust.tried.__wrapped__(cpu, torch.float16)
    assert "decoding are wrong here, by 1.0e" in str(said[0].message) and "row by row products do not run here (division by" in str(said[1].message)
    assert not rows.trusted and not gemv.trusted
