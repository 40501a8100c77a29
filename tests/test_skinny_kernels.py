"""The Triton kernels, run by Triton's interpreter on the CPU (tests/conftest.py asks for it), against plain torch."""

import pytest
import torch

pytest.importorskip("triton")
from veneer.ops import gemm_triton, lora, skinny, skinny_triton
from veneer.ops.lora import low_rank, reference


def near(a, b, tol=1e-5):
    assert a.shape == b.shape and a.isfinite().all()
    assert (a.float() - b.float()).norm() <= tol * b.float().norm()


def new(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize(("n", "k", "o", "r"), [(200, 144, 304, 24), (65, 2056, 40, 8)])
def test_products(n, k, o, r):
    x, a, g, z, b = new(n, k), new(r, k), new(n, o), new(n, r), new(o, r)
    near(skinny_triton.narrow(x, a, 0.5), 0.5 * x @ a.t())
    near(skinny_triton.outer(x, z), x.t() @ z)
    dz, db = skinny_triton.both(g, z, b)
    near(dz, g @ b)
    near(db, g.t() @ z)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_with_its_low_rank_term(bias):
    x, w, z, b, c = new(150, 72), new(304, 72), new(150, 48), new(304, 16), new(304) if bias else None
    low = z[:, 16:32]  # one map's columns of a product that several share
    near(gemm_triton.augmented(x, w, c, low, b), torch.nn.functional.linear(x, w, c) + low @ b.t())


@pytest.mark.parametrize("maps", [1, 2, 3])
def test_gradients_gathered_over_maps(maps):
    gs, ws = [new(150, o) for o in (304, 64, 72)[:maps]], [new(o, 88) for o in (304, 64, 72)[:maps]]
    dz, a = new(150, 16), new(16, 88)
    plain = sum(g @ w for g, w in zip(gs, ws, strict=True))
    near(gemm_triton.gathered(gs, ws, None, None), plain)
    near(gemm_triton.gathered(gs, ws, dz, a), plain + dz @ a)


class Here:
    """The two operators without a GPU's dispatch."""

    augmented = staticmethod(gemm_triton.augmented)
    gathered = staticmethod(gemm_triton.gathered)


@pytest.fixture
def kernels(monkeypatch):
    """low_rank with every kernel, on the CPU."""
    monkeypatch.setattr(skinny, "thin", skinny_triton)
    monkeypatch.setattr(skinny, "_plain", lambda t: t.stride(-1) == 1)
    calls = []

    def use(ws, *ts):
        calls.append(len(ws))
        return Here

    monkeypatch.setattr(skinny, "_gemm", use)
    return calls


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (1.0, 0.5, 2.0)])
def test_forward_and_gradients_with_every_kernel(kernels, dropout, scales):
    outs, k, r = (48, 24, 16), 40, 8
    x, gs = new(2, 33, k), [new(2, 33, o) for o in outs]
    ws, bs = [new(o, k) for o in outs], [new(outs[0]), None, new(outs[2])]
    downs, ups = [new(r, k, seed=i) for i in range(3)], [new(o, r) for o in outs]
    p, mask = (0.5, new(2, 33, k, seed=5) > 0) if dropout else (0.0, None)

    def run(f):
        leaves = [t.clone().requires_grad_() for t in (x, *downs, *ups)]
        ys = f(leaves[0], leaves[1:4], leaves[4:])
        return [*ys, *torch.autograd.grad(ys, leaves, gs)]

    ours = run(lambda x, a, b: low_rank(x, ws, bs, a, b, scales, p, mask))
    plain = run(lambda x, a, b: reference(x, ws, bs, a, b, scales, p, mask))
    assert sorted(set(kernels)) == [1, 3]
    for mine, theirs in zip(ours, plain, strict=True):
        near(mine, theirs, 1e-4)


def test_half_precision_is_as_near_to_fp32_as_the_plain_form(kernels):
    n, k, o, r = 70, 64, 48, 8
    half = [new(*s, dtype=torch.float16) for s in ((n, k), (o, k), (r, k), (o, r), (n, o))]

    def run(f, dtype):
        x, w, a, b, g = (t.to(dtype) for t in half)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        (y,) = f(leaves[0], w, leaves[1], leaves[2])
        return [y, *torch.autograd.grad(y, leaves, g)]

    exact = run(lambda x, w, a, b: reference(x, [w], [None], [a], [b], [2.0]), torch.float64)
    plain = run(lambda x, w, a, b: reference(x, [w], [None], [a], [b], [2.0]), torch.float16)
    ours = run(lambda x, w, a, b: low_rank(x, [w], [None], [a], [b], [2.0]), torch.float16)
    for p, q, e in zip(ours, plain, exact, strict=True):
        assert (p.double() - e).norm() <= 1.1 * (q.double() - e).norm()


def test_what_the_kernels_do_not_take_is_done_plainly():
    assert skinny._thin(new(4, 8)) is None and skinny._gemm([new(8, 8)], new(4, 8)) is None
    assert lora.narrow is skinny.narrow
