"""Low-rank maps on an fp8 base in one operation: outputs and gradients as the plain form's, by torch and by the kernels (which Triton's
interpreter runs here)."""

import importlib

import pytest
import torch
import torch._dynamo

import veneer as vn
from test_frozen_base import error, llama
from test_optimize import adapted, batch, same, step
from veneer.ops import fp8, fp8_lora

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
OUTS, K, R = (48, 32, 16), 64, 8


def new(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def run(f, outs=OUTS, scales=(2.0, 2.0, 2.0), dropout=False, dtype=torch.float32, ranks=(R, R, R), n=33):
    """Outputs and all gradients."""
    ws, gs = [fp8.quantised(new(o, K)) for o in outs], [new(2, n, o, dtype=dtype) for o in outs]
    cs = [new(o, dtype=dtype) if i else None for i, o in enumerate(outs)]
    leaves = [new(2, n, K, dtype=dtype), *(new(r, K, dtype=dtype, seed=9 + i) for i, r in zip(range(len(outs)), ranks, strict=False))]
    leaves = [t.requires_grad_() for t in (*leaves, *(new(o, r, dtype=dtype) for o, r in zip(outs, ranks, strict=False)))]
    x, downs, ups = leaves[0], leaves[1 : 1 + len(outs)], leaves[1 + len(outs) :]
    drop = (new(2, n, K, seed=5) > 0).to(dtype) * 2
    ys = f(x, ws, cs, downs, ups, scales[: len(outs)], x * drop if dropout else None)
    return [*ys, *torch.autograd.grad(ys, leaves, gs)]


def plain(x, ws, cs, downs, ups, scales, dropped):
    return fp8_lora.reference(x, dropped, ws, cs, downs, ups, scales)


CASES = {
    "one": {"outs": (48,)},
    "three": {},
    "scales": {"scales": (1.0, 0.5, 2.0)},
    "ranks": {"ranks": (8, 4, 2)},
    "dropout": {"dropout": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case):
    for ours, want in zip(run(fp8_lora.low_rank, **case), run(plain, **case), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    for ours, want in zip(run(fp8_lora.low_rank, dtype=torch.bfloat16, **case), run(plain, dtype=torch.bfloat16, **case), strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, want) < 1.5e-2


def test_x_is_quantised_once_and_each_dy_once(monkeypatch):
    seen, rows = [], fp8.rows
    monkeypatch.setattr(fp8, "rows", lambda x: seen.append(x.shape[-1]) or rows(x))
    ws = [rows(new(o, K)) for o in OUTS]
    seen.clear()
    assert len(ws) == 3
    run(fp8_lora.low_rank)
    assert sorted(seen) == sorted([K, *OUTS] + [o for o in OUTS] + [K] * 3)  # the last: both layouts of each W, made by this test


def test_an_unused_output_counts_for_nothing():
    x = new(5, K).requires_grad_()
    a, b = [new(R, K).requires_grad_() for _ in range(2)], [new(o, R).requires_grad_() for o in (48, 32)]
    ws = [fp8.quantised(new(o, K)) for o in (48, 32)]
    ours, want = (
        torch.autograd.grad(f(x, ws, [None, None], a, b, [1.0, 1.0], None)[1].sum(), [x, a[1], b[1], a[0]], allow_unused=True)
        for f in (fp8_lora.low_rank, plain)
    )
    for p, q in zip(ours[:3], want[:3], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert not ours[3].any() and want[3] is None


# -- kernels ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module("veneer.ops.fp8_triton")
    for name, size in (("BM", 32), ("BN", 64), ("BK", 32)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(fp8_lora, "kernels", module)
    monkeypatch.setattr(fp8_lora, "faster", {})
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_its_low_rank_term(kernels, bias, dtype):
    n, k, o = 70, 80, 112
    (q, s), w = fp8.rows(new(n, k)), fp8.quantised(new(o, k))
    z, b, c = new(n, 24, dtype=dtype)[:, 8:16], new(o, 8, dtype=dtype), new(o, dtype=dtype) if bias else None
    want = fp8.product(q, s, w.w, w.s, torch.float32) + z.float() @ b.float().t() + (0 if c is None else c.float())
    assert error(kernels.augmented(q, s, w.w, w.s, c, z, b), want) < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("maps", [1, 2, 3])
def test_gradients_gathered_over_maps(kernels, maps):
    n, k, outs = 70, 80, (112, 48, 16)[:maps]
    made, ws = [fp8.rows(new(n, o)) for o in outs], [fp8.quantised(new(o, k)) for o in outs]
    dz, a = new(n, 8 * maps), new(8 * maps, k)
    want = sum(fp8.product(q, s, w.wt, w.st, torch.float32) for (q, s), w in zip(made, ws, strict=True)) + dz @ a
    got = kernels.gathered([q for q, _ in made], [s for _, s in made], [w.wt for w in ws], [w.st for w in ws], dz, a)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("dropout", [False, True])
def test_forward_and_gradients_by_the_kernels(kernels, monkeypatch, dropout):
    calls = []

    class Here:
        """The operators without a GPU's dispatch."""

        @staticmethod
        def augmented(*a):
            calls.append("augmented")
            return kernels.augmented(*a)

        @staticmethod
        def gathered(*a):
            calls.append("gathered")
            return kernels.gathered(*a)

    want = run(plain, dropout=dropout)
    monkeypatch.setattr(torch.ops, "veneer_fp8", Here)
    monkeypatch.setattr(fp8_lora, "takes", lambda *a: True)
    for ours, exact in zip(run(fp8_lora.low_rank, dropout=dropout), want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert calls == ["augmented"] * 3 + ["gathered"] * (not dropout)


@pytest.mark.parametrize("times", [(1.0, 2.0), (2.0, 1.0)], ids=["faster", "slower"])
def test_kernels_are_measured_before_they_are_used(kernels, monkeypatch, times):
    given = []
    monkeypatch.setattr(fp8_lora, "_seconds", lambda call: times[given.append(call) or (len(given) - 1) % 2])
    fp8_lora.measured(torch.device("cpu"), [(K, (48, 32), R), (K, (48,), 4)], n=64, dtype=torch.float16)
    good = times[0] < times[1]
    assert fp8_lora.faster == {("augmented", K, (48,), R): good, ("augmented", K, (32,), R): good, ("gathered", K, (48, 32), 2 * R): good}
    assert fp8_lora.takes("gathered", 512, K, (48, 32), 2 * R, torch.bfloat16) == good
    for other in (
        ("gathered", 511, K, (48, 32), 2 * R, torch.bfloat16),
        ("gathered", 512, K, (32, 48), 2 * R, torch.bfloat16),
        ("gathered", 512, K, (48, 32), 2 * R, torch.float32),
    ):
        assert not fp8_lora.takes(*other)
    fp8_lora.faster.clear()
    monkeypatch.setattr(kernels, "augmented", lambda q, s, w, *a: torch.zeros(len(q), len(w)))
    fp8_lora.measured(torch.device("cpu"), [(K, (48,), R)], n=64, dtype=torch.float16)
    assert not fp8_lora.faster["augmented", K, (48,), R]  # wrong
    monkeypatch.setattr(kernels, "gathered", lambda *a: 1 / 0)
    with pytest.warns(UserWarning, match="fp8 kernels do not run here .division by"):
        fp8_lora.measured(torch.device("cpu"), [(K, (32, 48), R)], n=64, dtype=torch.float16)


# -- a model ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_trains_the_same_either_way(monkeypatch, dropout):
    inputs, found = batch("llama"), []
    for fuse in (None, True):
        calls = []
        monkeypatch.setattr(fp8_lora, "low_rank", lambda x, ws, *a, own=fp8_lora.low_rank, calls=calls: calls.append(len(ws)) or own(x, ws, *a))
        model = adapted(llama(), vn.LoRA(4, dropout=dropout, at="linear"))
        vn.optimize(model, compile=False, fuse=fuse, base_compute="fp8")
        torch.manual_seed(1)
        found.append(step(model, inputs))
        assert sorted(calls) == ([] if fuse is None else sorted([3, 1, 2, 1] * len(model.model.layers)))
        monkeypatch.undo()
    if not dropout:
        same(*found, 1e-4)
    vn.unoptimize(model)
    assert all(h.recipe is None or h.recipe.bundle is None for h in model._veneer_state.hosts.values())


def test_compiled_it_is_one_graph():
    torch._dynamo.reset()
    model, inputs = adapted(llama(), vn.LoRA(4, at="linear")), batch("llama")
    vn.optimize(model, compile=False, fuse=True, base_compute="fp8")
    want = step(model, inputs)
    vn.unoptimize(model)
    vn.optimize(model, compile={"backend": "aot_eager", "fullgraph": True}, fuse=True, base_compute="fp8")
    same(want, step(model, inputs), 1e-4)
