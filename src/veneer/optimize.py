"""Speed: fused low-rank maps, layers compiled one by one, a loss without logits. Nothing here changes what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attach import state_of
from .errors import AdapterError, ConfigError
from .frozen import frozen_base
from .fused import bundle
from .head import fused_head
from .install import exchange, layer_paths
from .neighbours import AdamW
from .plan import finite
from .saving import Saving, budgeted, recomputing
from .shells import SavingMixin
from .training import param_groups

SIDE_EFFECTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def optimize(
    model: nn.Module,
    *,
    fuse: bool | None = None,
    loss: bool = True,
    compile: bool | dict[str, Any] | None = None,
    base_compute: str | None = None,
    offload_base: bool = False,
    memory: str | float | None = None,
) -> nn.Module:
    """Make training steps and inference of an adapted model faster, in place; return the model.

    fuse       y = W x + b + s · B A x in one operation that keeps x once, for linears with one low-rank part, gated or not, or
               DoRA; maps of a block that read the same input (q, k, v; gate, up) share one product with their stacked A, and
               with dropout one mask. On by default (None), but for maps with base_compute, which need True and take ungated
               parts alone: that form has not been timed on a GPU yet
    loss       a causal language model called in training mode with `labels` computes its loss a few rows at a time
               and returns no logits (`logits` is None then); rows with label -100 cost nothing. In eval mode, or where
               the head is adapted or trained, all is as before
    compile    torch.compile for every repeated layer by itself, which compiles once for all like layers. None (default):
               where the model is on a GPU. A dict: True with these arguments for torch.compile
    base_compute  'fp8': the layers' frozen maps multiply in float8_e4m3, forward and for dx, with a scale for each token
               and each row of the weight (ops/fp8.py). This one is not exact: an output is off by some per cent, the base's
               own too. What is attached keeps its dtype. The weights are kept twice in 8 bits beside their own (2 bytes a
               number); needs compute capability 8.9 or more, and a CPU emulates it. Default None: the weights' own dtype
    offload_base  with base_compute: the original weights wait in CPU memory, and until they are back (vn.unoptimize) nothing
               can be attached or merged. Default False
    memory     'low': layers keep their inputs alone, in CPU memory, and compute the rest again in the backward pass
               (saving.py). A number from 0 to 1, for compiled layers: the share of what the compiler would keep that may
               be kept on the device; it recomputes what is cheapest for its size first. Default None: all of it

    Under vn.route the tensors of adapters of one shape lie in common memory from the first training step on (common.py):
    loss.backward() gives each its gradient, and vn.adamw updates them together. torch.autograd.grad does not find them then.

    The backward pass stops by itself at the lowest layer with an adapter, since nothing below needs a gradient.
    `vn.unoptimize(model)`, or detaching the last adapter, undoes it. Later vn.attach, vn.activate, vn.route, … work as
    ever. Raises: AdapterError where nothing is attached, or when the model is optimised already; ConfigError for what the
    arguments cannot be; CapabilityError where a device or a model cannot do it.
    """
    state = state_of(model)
    if state.fuse is not None:
        raise AdapterError("this model is optimised already", fix="vn.unoptimize(model) first")
    if compile is None:
        compile = any(p.is_cuda for p in model.parameters())
    share = _share(memory, compile is not False)
    if offload_base and base_compute is None:
        raise ConfigError("offload_base keeps the original weights away, and nothing computes in their place", fix="Give base_compute='fp8' too")
    undo: list[Any] = []

    def settle() -> None:
        for step in reversed(undo):
            step()
        undo.clear()

    base = frozen_base(model, state, base_compute, offload_base) if base_compute is not None else None
    if base is not None:
        undo.append(base.remove)
    steps = [*([base.renew] if base is not None else []), *([partial(bundle, model, state.hosts, fp8=fuse is True)] if fuse is not False else [])]
    state.fuse = lambda: [step() for step in steps] and None
    undo.append(lambda: _unfuse(state))
    state.refresh()
    if loss:
        head = fused_head(model, bool(compile))
        if head is not None:
            undo.append(lambda: head.remove(model))
    options = dict(compile) if isinstance(compile, dict) else {}
    if share is not None:
        if compile is not False:
            options["backend"] = budgeted(options.get("backend", recomputing), share)
        if memory == "low":
            undo.append(_save_little(model, state, recompute=compile is False))
    if compile is not False:
        undo.append(_compile(model, options))
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


def _share(memory: str | float | None, compiled: bool) -> float | None:
    """Of what the compiler would keep of a layer, the share that is kept."""
    if memory is None or memory == "low":
        return None if memory is None else 0.0
    if isinstance(memory, str) or not finite(memory) or not 0 <= memory <= 1:
        raise ConfigError(f"memory={memory!r} is neither 'low' nor a number from 0 to 1", where="memory", fix="memory='low', or for example memory=0.5")
    if not compiled:
        raise ConfigError("a share of the memory is kept by the compiler, and compile is off", where="memory", fix="memory='low', or compile=True")
    return float(memory)


def _save_little(model: nn.Module, state: Any, recompute: bool) -> Any:
    saving, mine = Saving(recompute), layers(model)
    paths = {id(m): p for p, m in model.named_modules()}
    for m in mine:
        m.__dict__["_veneer_saving"] = saving
        exchange(model, state, paths[id(m)], {SavingMixin})

    def undo() -> None:
        for m in mine:
            m.__dict__.pop("_veneer_saving", None)

    return undo


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
        m.compile(**{"backend": recomputing, **options})
    # layers share their code, and each kind of layer (the first with a gradient, one with another plan) is one entry
    config: Any = torch._dynamo.config
    key = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    new: dict[str, Any] = {key: max(getattr(config, key), 2 * len(mine), 16)}
    # what cells and bundles hold is used up in the same pass, so a checkpointed layer need not hold it once more in the backward pass
    if hasattr(config, SIDE_EFFECTS):
        new[SIDE_EFFECTS] = True
    before = {k: getattr(config, k) for k in new}
    for k, v in new.items():
        setattr(config, k, v)

    def undo() -> None:
        for m in mine:
            m._compiled_call_impl = None
        for k, v in before.items():
            setattr(config, k, v)

    return undo


def adamw(params: nn.Module | Iterable[Tensor], lr: float = 1e-4, **options: Any) -> torch.optim.Optimizer:
    """AdamW (torch's own) over what is trainable, as one kernel for all tensors where their device has it, and tensors
    that lie side by side in memory as one (neighbours.py).

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
    return AdamW(groups, lr=lr, **{"fused": fused, **options})
