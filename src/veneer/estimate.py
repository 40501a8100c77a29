"""What a training step will take, before there is a device for it: memory at the peak, and arithmetic."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attach import join
from .build import make_parts
from .code import own_class
from .errors import AdapterError, ConfigError
from .optimize import layers
from .optimize import optimize as optimise
from .plan import Plan
from .simulate import Ledger, Planner, simulated, without_storage

NAME = "estimate"
LIBRARY = 32 << 20  # the workspace that torch gives cuBLAS on a Hopper GPU; the allocator counts it


@dataclass(frozen=True)
class Estimate:
    """One training step; sizes in bytes.

    trainable    numbers that are trained
    weights      the model's tensors on the device: base, adapter, buffers, copies in another precision
    optimizer    AdamW's two moments
    activations  what the forward pass leaves for the backward pass
    logits       what the head and the loss need on top while they run
    workspace    what gradients and intermediate results need at the peak beyond all that, and the libraries
    peak         the most there is at once: weights + optimizer + workspace, and of activations and logits what is there then
    flops        multiplications and additions of forward and backward pass
    """

    trainable: int
    weights: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int
    flops: int

    def seconds(self, rate: float = 800e12) -> float:
        """The time of a step that computes without a pause: flops / rate, by default what an H100 reached in a large
        bf16 product. No step is faster; good ones take 1.5 times as long."""
        return self.flops / rate

    def __str__(self) -> str:
        gib = {k: f"{getattr(self, k) / 2**30:,.2f}" for k in ("weights", "optimizer", "activations", "logits", "workspace", "peak")}
        return (
            f"peak {gib.pop('peak')} GiB ({', '.join(f'{k} {v}' for k, v in gib.items())}); {self.trainable:,} trained; {self.flops / 1e12:,.1f} TFLOP a step"
        )


def estimate(
    model: nn.Module,
    plan: Plan | str | dict[str, Any] | list[Any] | None = None,
    batch: int = 1,
    length: int = 512,
    *,
    optimize: bool | dict[str, Any] = True,
    inputs: dict[str, Any] | None = None,
) -> Estimate:
    """Estimate memory and arithmetic of a training step of `model` with `plan`, for batch x length tokens.

    The step is run on a copy without numbers, on the meta device: nothing of the model's size is allocated, and the model
    may be on the meta device itself. What is kept, freed and written over is counted as the real code does it; in compiled
    layers, as the compiler's own partitioner decides. Data-dependent sizes count as the largest they can be. Takes some
    10 seconds for compiled layers, whose code is traced.

    plan       as for vn.attach; None: what is attached already, or the model as it is
    batch      rows, and `length` tokens in each, as `input_ids` and `labels`
    optimize   as on a GPU after vn.optimize(model) (True) or with these arguments for it (a dict); False: unoptimised
    inputs     what the model is called with instead, a dict; only the tensors' shapes count. Without a loss among what
               the model returns, its first tensor's sum is differentiated

    Counted as in training on one GPU with vn.adamw. Not counted: the CUDA context (about 0.5 GiB, outside of torch) and what
    an allocator cannot reuse. Raises: what vn.attach raises; AdapterError where `model` is optimised already; ConfigError
    for sizes that are none, or a model whose code needs numbers.
    """
    for name, value in (("batch", batch), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} is no number of {'rows' if name == 'batch' else 'tokens'}", where=name, fix=f"For example {name}=8")
    state = model.__dict__.get("_veneer_state")
    if state is not None and state.fuse is not None:
        raise AdapterError("this model is optimised already", fix="vn.unoptimize(model) first, and say optimize={...} here")
    own = without_storage(model)
    if plan is not None:
        from .adapter import Record

        plan = Plan.from_dict(plan)
        join(own, Record(NAME, plan, make_parts(own, plan, blank=True)), activate=True)
    own.train()
    planner = Planner(Ledger())
    if optimize is not False:
        options = dict(optimize) if isinstance(optimize, dict) else {}
        if options.get("compile") is not False:
            options["compile"] = {**(options["compile"] if isinstance(options.get("compile"), dict) else {}), "backend": planner}
        optimise(own, **options)
    return step(own, inputs or tokens(own, batch, length), planner)


def tokens(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """input_ids and labels as `model` takes them: a label for each token, or for each row where it answers so."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    takes = inspect.signature(own_class(model).forward).parameters
    given: dict[str, Any] = {"input_ids": ids, **({"use_cache": False} if "use_cache" in takes else {})}
    if "labels" not in takes:
        return given
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        with torch.no_grad(), Ledger(), simulated(None):
            answer = first(model(**{**given, "input_ids": ids[:1, :2]}))
        if answer.dim() == 2:
            kind = torch.float32 if answer.shape[1] == 1 else torch.long
            return {**given, "labels": torch.zeros(batch, dtype=kind, device="meta")}
    return {**given, "labels": ids}


def first(out: Any) -> Tensor:
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else (out,)
    return next(v for v in values if isinstance(v, Tensor))


def step(model: nn.Module, inputs: dict[str, Any], planner: Planner) -> Estimate:
    """Run one step of `model`, which is on the meta device, and read the ledger."""
    ledger, marks = planner.ledger, {}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = ledger.own(t for m in model.modules() for t in tensors_of(m))
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)

    def body(*_: Any) -> None:  # after the last layer's call begins what is the head's and the loss's
        marks["peak"] = max(marks.get("peak", 0), ledger.peak)
        marks["body"] = ledger.peak = ledger.live

    hooks = [m.register_forward_hook(body) for m in layers(model)]
    inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    try:
        with simulated(planner), ledger:
            out = model(**inputs)
            loss = out["loss"] if isinstance(out, dict) and out.get("loss") is not None else first(out).float().sum()
            kept, head = ledger.live, ledger.peak
            loss.backward()
    except RuntimeError as e:
        if "meta" not in str(e):
            raise
        raise ConfigError(
            f"the model's code needs numbers, which an estimate does not have: {e}", fix="Measure a step instead: torch.cuda.max_memory_allocated()"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    peak = max(ledger.peak, marks.get("peak", 0))
    logits = head - marks.get("body", 0)
    return Estimate(
        sum(p.numel() for p in trained), weights, moments, kept, logits, max(0, peak - max(kept, head)) + LIBRARY, weights + moments + peak + LIBRARY,
        ledger.flops,
    )  # fmt: skip


def tensors_of(module: nn.Module) -> list[Tensor]:
    """A module's own tensors on the device: parameters that have not been moved away, buffers, and a product's copies."""
    product = module.__dict__.get("_veneer_product")
    mine = [p for k, p in module._parameters.items() if p is not None and not (k == "weight" and product is not None and product.away)]
    return [*mine, *(b for b in module._buffers.values() if b is not None), *(product.weight if product is not None else ())]
