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
    b = grads(lambda: reference(x, None, ws, bs, downs, ups, s), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    x, ws, bs, downs, ups, s = make(torch.float64, 2)
    assert torch.autograd.gradcheck(lambda x, *t: tuple(low_rank(x, ws, bs, t[:2], t[2:], s)), (x, *downs, *ups))
    assert torch.autograd.gradcheck(lambda x, *t: tuple(low_rank(x, ws, bs, t[:2], t[2:], s, dropped=x * 0.5)), (x, *downs, *ups))


def test_bf16_is_as_near_to_fp32_as_the_plain_form():
    args = make(torch.float32, 3)
    half = [[t if isinstance(t, float) or t is None else t.detach().bfloat16().requires_grad_(t.requires_grad) for t in ts] for ts in args[1:]]
    xh = args[0].detach().bfloat16().requires_grad_()

    def up(t):
        return t.detach().float().requires_grad_(t.requires_grad)

    x32, (w, b, d, u) = up(xh), ([up(t) for t in ts] for ts in half[:4])
    exact = grads(lambda: reference(x32, None, w, b, d, u, args[5]), x32, d, u)
    ours = grads(lambda: low_rank(xh, *half[:4], args[5]), xh, half[2], half[3])
    for p, q in zip(ours, exact, strict=True):
        assert (p.float() - q).norm() / q.norm() < 1e-2


def test_dropout_input_and_unused_outputs_and_frozen_input():
    x, ws, bs, downs, ups, s = make(torch.float32, 2)
    drop = (torch.rand(x.shape) > 0.5).float() * 2
    a = grads(lambda: low_rank(x, ws, bs, downs, ups, s, dropped=x * drop), x, downs, ups)
    b = grads(lambda: reference(x, x * drop, ws, bs, downs, ups, s), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    (g,) = torch.autograd.grad(low_rank(x, ws, bs, downs, ups, s)[1].sum(), [x])
    (h,) = torch.autograd.grad(reference(x, None, ws, bs, downs, ups, s)[1].sum(), [x])
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)
    still = x.detach()
    a = torch.autograd.grad(low_rank(still, ws, bs, downs, ups, s)[0].square().sum(), [downs[0], ups[0]])
    b = torch.autograd.grad(reference(still, None, ws, bs, downs, ups, s)[0].square().sum(), [downs[0], ups[0]])
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_compiled_whole():
    x, ws, bs, downs, ups, s = make(torch.float32, 2)
    f = torch.compile(lambda x, d, u: low_rank(F.silu(x), ws, bs, d, u, s), backend="aot_eager", fullgraph=True)
    a = grads(lambda: f(x, downs, ups), x, downs, ups)
    b = grads(lambda: reference(F.silu(x), None, ws, bs, downs, ups, s), x, downs, ups)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
