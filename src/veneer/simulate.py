"""A training step on tensors without storage: what would be allocated when, and the arithmetic.

The model's own code runs on the meta device. A dispatch mode sees every tensor come and go; compiled layers go through the
same tracing, decompositions and partitioning as for a GPU, and a last step that plans the buffers instead of writing
kernels: what a product or another closed operation reads or returns is a buffer, what lies between is fused.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from .saving import recomputed

aten = torch.ops.aten


def storage_of(t: Tensor) -> tuple[int, int]:
    s = t.untyped_storage()
    return s._cdata, s.nbytes()


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}
        self.aside = False
        self.flops = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # it changes nothing, so code may be compiled under it

    def add(self, t: Tensor) -> None:
        key, size = storage_of(t)
        if key in self.known or not t.is_meta:
            return
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(t.untyped_storage(), self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)

    def own(self, tensors: Iterator[Tensor]) -> int:
        """Bytes of tensors that are there anyway, which are not counted again."""
        found = dict(storage_of(t) for t in tensors if t.is_meta)
        self.known.update(dict.fromkeys(found, 0))
        return sum(found.values())

    def passing(self, size: int) -> None:
        """Something of this size comes and goes."""
        self.peak = max(self.peak, self.live + size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:  # depends on data: all of it, which is the most it can be
            out = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        elif func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # what models ask of their masks: are all tokens real, is it one sequence
        else:
            out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        if not self.aside:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.add(t)
        return out


# -- attention, which on the meta device would be taken apart ---------------------------------------------------------
@torch.library.custom_op("veneer::attention_plan", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    # the kernels keep heads beside features, whatever the order of the dimensions
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2), q.new_empty(b, h, n, dtype=torch.float32)


@torch.library.custom_op("veneer::attention_plan_backward", mutates_args=())
def attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


@attention_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # the last is the kernel's own: dq is summed in fp32, and shared keys' gradients come for each query head
    shared = 2 * q.numel() if k.shape[1] != q.shape[1] else 0
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(4 * q.numel() + shared * q.element_size(), dtype=torch.uint8)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, g: Tensor, _: Any) -> Any:
    return torch.ops.veneer.attention_plan_backward(g, *ctx.saved_tensors)[:3]


attention.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.veneer.attention_plan)
def _forward_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


@register_flop_formula(torch.ops.veneer.attention_plan_backward)
def _backward_flops(g: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(g, q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


def planned_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None, **kwargs: Any
) -> Tensor:
    return torch.ops.veneer.attention_plan(query, key, value)[0]


# -- compiled graphs --------------------------------------------------------------------------------------------------
def transient(graph: torch.fx.Graph, freeable: list[bool]) -> int:
    """Bytes over what is there when the graph begins, at its peak. freeable[i]: input i goes with its last use."""
    nodes = list(graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    returned = {n for n in nodes[-1].all_input_nodes}
    reads: dict[Any, set[Any]] = {}  # node -> the buffers that computing it reads
    buffers: dict[Any, int] = {}
    closed = {n for n in nodes if n.op == "call_function" and _closed(n.target)}
    needed = returned | {a for n in closed for a in n.all_input_nodes}
    for n in nodes:
        if n.op == "placeholder":
            buffers[n] = _bytes(n.meta.get("val"))
            reads[n] = {n}
        elif n.op == "call_function":
            mine = set().union(*(reads[a] for a in n.all_input_nodes)) if n.all_input_nodes else set()
            if n in closed or (n in needed and not _view(n.target)):
                buffers[n], n.meta["reads"], reads[n] = _bytes(n.meta.get("val")), mine, {n}
            else:
                reads[n] = mine
        elif n.op != "output":
            reads[n] = set()
    last: dict[Any, int] = dict.fromkeys(buffers, -1)
    for n in buffers:
        for b in n.meta.get("reads", ()):
            last[b] = max(last[b], at[n])
    for n in returned:
        for b in reads[n]:
            last[b] = len(nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    for n, free in zip(inputs, freeable, strict=True):
        if not free:
            last[n] = len(nodes)
    dying: dict[int, int] = {}
    for b, i in last.items():
        dying[i] = dying.get(i, 0) + buffers[b]
    live = peak = 0
    for i, n in enumerate(nodes):
        if n not in buffers or n.op == "placeholder":
            continue
        # a fused kernel may write over what it is the last to read; a product may not
        peak = max(peak, live + buffers[n] - (0 if n in closed else min(buffers[n], dying.get(i, 0))))
        live += buffers[n] - dying.get(i, 0)
        if last[n] == -1:
            live -= buffers[n]
    return peak


def _closed(target: Any) -> bool:
    """Whether a compiler leaves the operation to a library or to its author."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace != "aten" and target.namespace != "prims" or target._opname in CLOSED or "attention" in target._opname


CLOSED = frozenset(
    ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward", "_grouped_mm", "embedding_dense_backward", "index_put")
)


def _view(target: Any) -> bool:
    return getattr(target, "is_view", False) or target is operator.getitem


def _bytes(val: Any) -> int:
    tensors = [t for t in tree_leaves(val) if isinstance(t, Tensor)]
    return sum(int(t.numel()) * t.element_size() for t in tensors)


class Planner:
    """A compiler whose products only say what they would need, to `ledger`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        def plan(gm: Any, example: Any, backward: bool = False) -> Any:
            sizes: dict[Any, int] = {}

            def run(*args: Any) -> Any:
                ledger = self.ledger
                free = tuple(backward and isinstance(a, Tensor) and ledger.known.get(storage_of(a)[0], 0) > 0 for a in args)
                if free not in sizes:
                    sizes[free] = transient(gm.graph, list(free))
                ledger.passing(sizes[free])
                ledger.aside, before = True, ledger.aside
                try:
                    out = gm(*args)
                finally:
                    ledger.aside = before
                for t in tree_leaves(out):
                    if isinstance(t, Tensor):
                        ledger.add(t)
                return out

            return make_boxed_func(run)

        backend = aot_autograd(
            fw_compiler=plan, bw_compiler=lambda gm, ex: plan(gm, ex, backward=True), partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )  # fmt: skip
        with recomputed():
            return backend(graph, inputs)


@contextlib.contextmanager
def simulated(planner: Planner | None) -> Iterator[None]:
    """Attention, and the loss where there is a planner for it, as they are on a GPU."""
    from .ops import loss

    compiled = {} if planner is None else {"slope": torch.compile(loss.loss_and_slope, dynamic=False, backend=planner)}
    with mock.patch.object(F, "scaled_dot_product_attention", planned_attention), mock.patch.dict(loss._COMPILED, compiled):
        yield


def without_storage(model: nn.Module) -> Any:
    """A copy of `model` on the meta device, made without a copy of its numbers."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        if id(t) not in memo:
            blank = torch.empty_like(t, device="meta")
            memo[id(t)] = nn.Parameter(blank, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else blank
    return copy.deepcopy(model, memo)
