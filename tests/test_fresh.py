"""What our autograd functions return while a compiler traces them is an operation's own result: see ops/fresh.py. torch 2.11 gives
wrong gradients otherwise; the graphs that a later torch hands to its compilers show it too."""

import pytest
import torch
import torch._dynamo

from veneer.methods.osf import Along
from veneer.ops import fp8, fp8_lora, rows, sparse
from veneer.ops.lora import low_rank


def new(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W = [new(16, 32), new(24, 32)]
Q = fp8.quantised(W[0])
PLACES = torch.arange(0, 512, 13)
BASIS = torch.linalg.qr(new(16, 3))[0]

CALLS = {
    "one low-rank map": (lambda x, a, b: low_rank(x, W[:1], [None], [a], [b], [2.0]), (8, 32), (4, 32), (16, 4)),
    "two low-rank maps": (lambda x, a, b, c, d: low_rank(x, W, [None] * 2, [a, c], [b, d], [2.0, 1.0]), (8, 32), (4, 32), (16, 4), (4, 32), (24, 4)),
    "gated and gained": (lambda x, a, b, t, g: low_rank(x, W[:1], [None], [a], [b], [2.0], gates=[t], gains=[g]), (8, 32), (4, 32), (16, 4), (8, 1), (16,)),
    "fp8": (lambda x: fp8.linear(x, Q, None), (8, 32)),
    "fp8 with a low-rank map": (lambda x, a, b: fp8_lora.low_rank(x, [Q], [None], [a], [b], [2.0]), (8, 32), (4, 32), (16, 4)),
    "rows": (lambda x, a, b: rows.Rows.apply(None, x, None, a, b, 1, W[0], None), (8, 32), (2, 4, 32), (2, 16, 4)),
    "sparse": (lambda x, v: sparse.sparse_product(x, v, PLACES, 16), (8, 32), (len(PLACES),)),
    "projected": (lambda p: Along.apply(p, BASIS, True), (16, 4)),
}


def results(graph):
    """The nodes that the traced functions return."""
    for node in graph.graph.nodes:
        if "autograd_function_apply" in str(node.target):
            body = graph.get_submodule(node.args[0].target)
            (out,) = (n for n in body.graph.nodes if n.op == "output")
            returned = out.args[0][0]
            yield from returned if isinstance(returned, (tuple, list)) else (returned,)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_fresh_and_gradients_right(monkeypatch, name, gathers):
    torch._dynamo.reset()
    monkeypatch.setattr(sparse, "SHARE", float(gathers))
    f, *shapes = CALLS[name]
    ins = [new(*s).requires_grad_() for s in shapes]
    seen = []

    def backend(graph, _):
        seen.extend(results(graph))
        return graph

    def run(g):
        ys = g(*ins)
        return [*(ys if isinstance(ys, (tuple, list)) else [ys])]

    ys = run(torch.compile(f, backend=backend, fullgraph=True))
    tensors = [n for n in seen if isinstance(n, torch.fx.Node)]
    assert tensors
    for node in tensors if torch.__version__ >= "2.13" else ():  # an earlier one's graphs return what is kept for the backward pass, too
        assert getattr(node.target, "__name__", node.target) in ("clone", "matmul", "mul"), node.format_node()
    slopes = [torch.ones_like(y) for y in ys]
    for p, q in zip(torch.autograd.grad(ys, ins, slopes), torch.autograd.grad(run(f), ins, slopes), strict=True):
        torch.testing.assert_close(p, q)
