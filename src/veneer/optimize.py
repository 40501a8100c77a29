"""Speed: fused low-rank maps, layers compiled one by one, a loss without logits. Nothing here changes what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attach import state_of
from .errors import AdapterError
from .fused import bundle
from .head import fused_head
from .install import layer_paths
from .training import param_groups


def optimize(model: nn.Module, *, fuse: bool | None = None, loss: bool = True, compile: bool | dict[str, Any] | None = None) -> nn.Module:
    """Make training steps and inference of an adapted model faster, in place; return the model.

    fuse       y = W x + b + s · B A x in one operation that keeps x once, for linears with one ungated low-rank part;
               maps of a block that read the same input (q, k, v; gate, up) share one product with their stacked A.
               With dropout each map keeps a mask of its own, and they run one by one. None (default): where layers are
               not compiled; the compiler's own fusion was faster on an H100 (docs/performance.md)
    loss       a causal language model called in training mode with `labels` computes its loss a few rows at a time
               and returns no logits (`logits` is None then); rows with label -100 cost nothing. In eval mode, or where
               the head is adapted or trained, all is as before
    compile    torch.compile for every repeated layer by itself, which compiles once for all like layers. None (default):
               where the model is on a GPU. A dict: True with these arguments for torch.compile

    The backward pass stops by itself at the lowest layer with an adapter, since nothing below needs a gradient.
    `vn.unoptimize(model)`, or detaching the last adapter, undoes it. Later vn.attach, vn.activate, vn.route, … work as
    ever. Raises: AdapterError where nothing is attached, or when the model is optimised already.
    """
    state = state_of(model)
    if state.fuse is not None:
        raise AdapterError("this model is optimised already", fix="vn.unoptimize(model) first")
    if compile is None:
        compile = any(p.is_cuda for p in model.parameters())
    if fuse is None:
        fuse = compile is False
    undo: list[Any] = []

    def settle() -> None:
        for step in reversed(undo):
            step()
        undo.clear()

    state.fuse = partial(bundle, model, state.hosts) if fuse else _nothing
    undo.append(lambda: _unfuse(state))
    state.refresh()
    if loss:
        head = fused_head(model, bool(compile))
        if head is not None:
            undo.append(lambda: head.remove(model))
    if compile is not False:
        undo.append(_compile(model, compile if isinstance(compile, dict) else {}))
    state.optimized = settle
    state.undo.append(settle)
    return model


def unoptimize(model: nn.Module) -> nn.Module:
    """Undo vn.optimize. Raises: AdapterError where the model is not optimised."""
    state = state_of(model)
    if state.optimized is None:
        raise AdapterError("this model is not optimised", fix="vn.optimize(model) does so")
    state.undo.remove(state.optimized)
    state.optimized()
    state.refresh()
    return model


def _nothing() -> None: ...


def _unfuse(state: Any) -> None:
    state.fuse = state.optimized = None


def layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of every tower, outermost first: what is compiled one by one."""
    paths = layer_paths(model)
    if not paths:
        for name, m in model.named_modules():
            if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(c).__qualname__ for c in m}) == 1 and "_veneer" not in name.split("."):
                paths |= {f"{name}.{i}" for i in range(len(m))}
    outer = [p for p in paths if not any(p != q and p.startswith(f"{q}.") for q in paths)]
    return [model.get_submodule(p) for p in sorted(outer)]


def _compile(model: nn.Module, options: dict[str, Any]) -> Any:
    import torch._dynamo

    mine = [m for m in layers(model) if m._compiled_call_impl is None]
    for m in mine:
        m.compile(**options)
    # layers share their code, and each kind of layer (the first with a gradient, one with another plan) is one entry
    config: Any = torch._dynamo.config
    key = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    limit = getattr(config, key)
    setattr(config, key, max(limit, 2 * len(mine), 16))

    def undo() -> None:
        for m in mine:
            m._compiled_call_impl = None
        setattr(config, key, limit)

    return undo


def adamw(params: nn.Module | Iterable[Tensor], lr: float = 1e-4, **options: Any) -> torch.optim.Optimizer:
    """AdamW (torch's own) over what is trainable, as one kernel for all tensors where their device has it.

    params    a model (its trainable parameters are taken) or parameters; options as torch.optim.AdamW

    Raises: AdapterError where nothing is trainable.
    """
    if isinstance(params, nn.Module):
        groups = param_groups(params, lr, options.pop("weight_decay", 0.01))
    else:
        groups = [{"params": own} for own in ([p for p in params if p.requires_grad],) if own]
    own = [p for g in groups for p in g["params"]]
    if not own:
        raise AdapterError("nothing here is trainable", fix="Attach a plan first: vn.attach(model, plan, name='mine')")
    fused = all(p.device.type in ("cuda", "cpu", "xpu") and p.is_floating_point() for p in own)
    return torch.optim.AdamW(groups, lr=lr, **{"fused": fused, **options})
