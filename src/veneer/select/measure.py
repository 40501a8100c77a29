"""What a plan costs, measured: parameters without training, inference time against the base, memory of a training step."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import attach, detach
from ..build import make_parts
from ..calls import device_of, evaluating, moved, wait
from ..plan import Plan

NAME = "candidate"


def count(model: nn.Module, plan: Plan) -> int:
    """Trainable numbers of `plan` on `model`, gates included. On the meta device: nothing is drawn or trained."""
    found: dict[int, int] = {}
    for part in make_parts(model, plan, blank=True):
        for p in part.parameters():
            found[id(p)] = p.numel()
    return sum(found.values())


def total(model: nn.Module) -> int:
    """Parameters of the base, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def merges(plan: Plan) -> bool:
    """Whether `plan` can be folded into the weights, by what its methods declare, and then costs no time."""
    return all(t.method.mergeable and (t.gate is None or t.gate.per == "constant") for t in plan.terms())


def _block(model: nn.Module, batch: dict[str, Any], device: torch.device, seconds: float, most: int = 50) -> float:
    """Seconds of one call: the median over calls that take `seconds` together (3 at least)."""
    times: list[float] = []
    with evaluating(model), torch.inference_mode():
        model(**batch)
        while len(times) < 3 or (sum(times) < seconds and len(times) < most):
            wait(device)
            begin = time.perf_counter()
            model(**batch)
            wait(device)
            times.append(time.perf_counter() - begin)
    return median(times)


def latency(model: nn.Module, plan: Plan, batch: dict[str, Any], *, rounds: int = 5, seconds: float = 0.03) -> tuple[float, float]:
    """(time of inference over the base's, the base's seconds for one batch), on the model's own device.

    The base and the adapted model take turns, `rounds` times, the base without anything attached; the answer is the median
    of the rounds' quotients, so that what else the machine does meets both alike. A plan that merges is the base's own
    modules once it is merged: its quotient is 1 by construction.
    """
    device = device_of(model)
    batch = moved(batch, device)
    if merges(plan):
        return 1.0, _block(model, batch, device, seconds)
    ratios, bases = [], []
    for i in range(rounds):
        order = (False, True) if i % 2 else (True, False)
        found = {}
        for adapted in order:
            if adapted:
                attach(model, plan, name=NAME)
            try:
                found[adapted] = _block(model, batch, device, seconds)
            finally:
                if adapted:
                    detach(model, NAME)
        ratios.append(found[True] / found[False])
        bases.append(found[False])
    return median(ratios), median(bases)


def memory(model: nn.Module, plan: Plan, batch: dict[str, Any]) -> int:
    """Bytes at the peak of one training step with AdamW on `batch`.

    On a GPU the allocator's own peak. Elsewhere it is counted: the base's weights, for each trainable number its value,
    gradient and AdamW's two moments, and every tensor that autograd keeps for the backward pass, each storage once. Work
    space within an operation is not counted then. The model is left as it was.
    """
    device = device_of(model)
    batch = moved(batch, device)
    kept: dict[int, int] = {}
    modes = {m: m.training for m in model.modules()}
    adapter = attach(model, plan, name=NAME)
    own = list(adapter.parameters())
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        where = t.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = t.untyped_storage().nbytes()
        return t

    try:
        model.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model(**batch).loss
            loss.backward()
        states = 2 * sum(p.numel() * p.element_size() for p in own)
        if device.type == "cuda":
            wait(device)
            return int(torch.cuda.max_memory_allocated(device)) + states
        return sum(weights.values()) + states + sum(p.numel() * p.element_size() for p in own) + sum(kept.values())
    finally:
        detach(model, NAME)
        for m, mode in modes.items():
            m.training = mode
