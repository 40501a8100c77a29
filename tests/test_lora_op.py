"""ops/lora.py against its plain reference."""

import pytest
import torch
import torch.nn.functional as F

from veneer.ops.lora import low_rank, reference


def make(dtype, n=2, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    outs, ranks = (6, 4, 5)[:n], (3, 2, 3)[:n]
    x = new(2, 5, 7).requires_grad_()
    ws, bs = [new(o, 7) for o in outs], [new(o) if bias else None for o in outs]
    downs, ups = [new(r, 7).requires_grad_() for r in ranks], [new(o, r).requires_grad_() for o, r in zip(outs, ranks, strict=True)]
    return x, ws, bs, downs, ups, [2.0, 1.0, 0.5][:n]


def grads(fn, x, downs, ups):
    ys = fn()
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape).to(y.dtype)).sum() for y in ys)
    return [*ys, *torch.autograd.grad(loss, [x, *downs, *ups])]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference(n, bias):
    x, ws, bs, downs, ups, s = make(torch.float32, n, bias)
    a = grads(lambda: low_rank(x, ws, bs, downs, ups, s), x, downs, ups)
    b = grads(lambda: reference(x, ws, bs, downs, ups, s), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    x, ws, bs, downs, ups, s = make(torch.float64, 2)
    assert torch.autograd.gradcheck(lambda x, *t: tuple(low_rank(x, ws, bs, t[:2], t[2:], s)), (x, *downs, *ups))
    mask, t, g = torch.rand(x.shape) > 0.5, torch.rand(2, 5, 1, dtype=x.dtype).requires_grad_(), torch.rand(6, dtype=x.dtype).requires_grad_()

    def whole(x, t, g, *ab):
        return tuple(low_rank(x, ws, bs, ab[:2], ab[2:], s, 0.5, mask, gates=[None, t], gains=[g, None]))

    assert torch.autograd.gradcheck(whole, (x, t, g, *downs, *ups))


def test_bf16_is_as_near_to_fp32_as_the_plain_form():
    args = make(torch.float32, 3)
    half = [[t if isinstance(t, float) or t is None else t.detach().bfloat16().requires_grad_(t.requires_grad) for t in ts] for ts in args[1:]]
    xh = args[0].detach().bfloat16().requires_grad_()

    def up(t):
        return t.detach().float().requires_grad_(t.requires_grad)

    x32, (w, b, d, u) = up(xh), ([up(t) for t in ts] for ts in half[:4])
    exact = grads(lambda: reference(x32, w, b, d, u, args[5]), x32, d, u)
    ours = grads(lambda: low_rank(xh, *half[:4], args[5]), xh, half[2], half[3])
    for p, q in zip(ours, exact, strict=True):
        assert (p.float() - q).norm() / q.norm() < 1e-2


def test_dropout_input_and_unused_outputs_and_frozen_input():
    x, ws, bs, downs, ups, s = make(torch.float32, 2)
    mask = torch.rand(x.shape) > 0.25
    a = grads(lambda: low_rank(x, ws, bs, downs, ups, s, 0.25, mask), x, downs, ups)
    b = grads(lambda: reference(x, ws, bs, downs, ups, s, 0.25, mask), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    (g,) = torch.autograd.grad(low_rank(x, ws, bs, downs, ups, s)[1].sum(), [x])
    (h,) = torch.autograd.grad(reference(x, ws, bs, downs, ups, s)[1].sum(), [x])
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)
    still = x.detach()
    a = torch.autograd.grad(low_rank(still, ws, bs, downs, ups, s)[0].square().sum(), [downs[0], ups[0]])
    b = torch.autograd.grad(reference(still, ws, bs, downs, ups, s)[0].square().sum(), [downs[0], ups[0]])
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_compiled_whole():
    x, ws, bs, downs, ups, s = make(torch.float32, 2)
    f = torch.compile(lambda x, d, u: low_rank(F.silu(x), ws, bs, d, u, s), backend="aot_eager", fullgraph=True)
    a = grads(lambda: f(x, downs, ups), x, downs, ups)
    b = grads(lambda: reference(F.silu(x), ws, bs, downs, ups, s), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 1, 1), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_gates_and_gains(shape, bias):
    x, ws, bs, downs, ups, s = make(torch.float32, 3, bias)
    t, g = torch.rand(shape).requires_grad_(), torch.rand(6).requires_grad_()
    mask = torch.rand(x.shape) > 0.25

    def run(f):
        return grads(lambda: f(x, ws, bs, downs, ups, s, 0.25, mask, [t, t * 0.5, None], [g, None, g[:5] + 1]), x, [t, g, *downs], ups)

    for p, q in zip(run(low_rank), run(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_gains_finer_than_the_output():
    """A gain that bf16 would round to 1 is not lost between tokens, and its gradient is in its own precision."""
    torch.manual_seed(0)
    x, w = torch.randn(500, 16).bfloat16(), torch.randn(6, 16).bfloat16()
    a, b, g = torch.randn(2, 16).bfloat16(), torch.randn(6, 2).bfloat16(), torch.full((6,), 1.002).requires_grad_()
    (y,) = low_rank(x, [w], [None], [a], [b], [1.0], gains=[g])
    (d,) = torch.autograd.grad(y.float().square().sum(), g)
    (exact,) = reference(x.float(), [w.float()], [None], [a.float()], [b.float()], [1.0], gains=[g])
    (e,) = torch.autograd.grad(exact.square().sum(), g)
    assert y.dtype == torch.bfloat16 and d.dtype == torch.float32
    torch.testing.assert_close(d, e, rtol=1e-2, atol=0)
    assert (y.float() - exact).norm() < 5e-3 * exact.norm()


def test_dropout_keeps_the_share_that_it_should_and_one_mask_for_all_maps():
    n, p = 4000, 0.3
    x, w, eye = torch.ones(n, 8, requires_grad=True), torch.zeros(8, 8), torch.eye(8)
    torch.manual_seed(0)
    a, b = low_rank(x, [w, w], [None, None], [eye, eye], [eye, eye], [1.0, 1.0], p)
    kept = a != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.01 and (kept.float().mean(0) - (1 - p)).abs().max() < 0.04
    torch.testing.assert_close(a, kept.float() / (1 - p))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a.sum(), x)[0], kept.float() / (1 - p))
    f = torch.compile(lambda x: low_rank(x, [w], [None], [eye], [eye.clone()], [1.0], p)[0], backend="aot_eager", fullgraph=True)
    y = f(x)
    assert abs((y != 0).float().mean() - (1 - p)) < 0.01
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach())
