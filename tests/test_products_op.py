"""ops/products.py: large fp32 products on a CPU are oneDNN's, and say the same as torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from veneer.ops import products
from veneer.ops.lora import low_rank, reference


def new(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch):
    assert products._own is not None
    seen = []

    def own(*args):
        seen.append(args[0].shape)
        return torch.ops.mkldnn._linear_pointwise(*args)

    monkeypatch.setattr(products, "_own", own)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_large_products_of_any_layout(calls, bias):
    x, w, c = new(256, 144), new(136, 144), new(136) if bias else None
    with torch.no_grad():
        for a, b in ((x, w), (x.t().contiguous().t(), w), (x, w.t().contiguous().t()), (new(256, 300)[:, 20:164], new(200, 144)[7:143])):
            torch.testing.assert_close(products.linear(a, b, c), F.linear(a, b, c), rtol=1e-4, atol=1e-4)
            y = new(256, 136)
            torch.testing.assert_close(products.add_(y.clone(), a, b), y + F.linear(a, b), rtol=1e-4, atol=1e-4)
    assert len(calls) == 8


def test_what_torch_multiplies_itself(calls):
    x, w = new(256, 144), new(136, 144)
    products.linear(x, w)  # a gradient may be asked for
    with torch.no_grad():
        products.linear(x[:8], w)
        products.linear(x.double(), w.double())
        products.linear(x.bfloat16(), w.bfloat16())
        with FlopCounterMode(display=False) as flops:
            products.linear(x, w)
        assert flops.get_total_flops() == 2 * 256 * 144 * 136
        torch.compile(products.linear, backend="eager", fullgraph=True)(x, w)
    assert not calls


def test_a_low_rank_map_of_this_size(calls):
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate((new(256, 144), new(136, 144), new(4, 144), new(136, 4))))
    g = new(256, 136)
    ours = torch.autograd.grad(low_rank(x, [w], [None], [a], [b], [2.0])[0], [x, a, b], g)
    assert len(calls) == 2  # y and dx
    for p, q in zip(ours, torch.autograd.grad(reference(x, [w], [None], [a], [b], [2.0])[0], [x, a, b], g), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-3)
