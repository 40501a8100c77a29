"""Ablation: what an adapter loses, and what a call saves, without some of its parts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapter import Record
from .calls import call, device_of, evaluating, wait
from .compose.gate import Gate
from .errors import PlanError

ROUNDS = 7  # timed calls with and without, by turns


def losses_of(model: nn.Module, state: Any, record: Record, groups: dict[Any, list[Any]], score: Callable[[nn.Module], Any]) -> dict[Any, Any]:
    """What removing each group takes from the score and its standard error, with this adapter in use."""
    active = state.active
    try:
        if record.name not in active:
            state.active = (record.name,)
            state.refresh()
        whole = _numbers(score(model), "the whole adapter")
        found = {}
        for key, parts in groups.items():
            without = _numbers(_without(model, state, parts, lambda: score(model)), f"all but {' at '.join(key)}")
            if len(without) != len(whole):
                raise PlanError(f"score gave {len(whole)} numbers, and then {len(without)}", fix="Give one for each held-out example, in the same order")
            loss = torch.tensor(whole, dtype=torch.float64) - torch.tensor(without, dtype=torch.float64)
            found[key] = float(loss.mean()), float(loss.std() / len(whole) ** 0.5) if len(whole) > 1 else None
    finally:
        if state.active != active:
            state.active = active
            state.refresh()
    return found


def by_outputs(name: str, state: Any, batches: list[Any]) -> Callable[[nn.Module], list[float]]:
    """A score that needs no labels: minus ‖y - y_whole‖² / ‖y_base - y_whole‖² on each batch, y the logits, or the first tensor of others.

    The first call is the whole adapter's. Raises: PlanError for a name that is not 'outputs'.
    """
    if name != "outputs":
        raise PlanError(f"score={name!r}", fix="Give score='outputs', or a function of the model")
    whole: list[torch.Tensor] = []
    scale: list[float] = []

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with evaluating(model), torch.no_grad():
            return [_output(call(model, b)).double() for b in batches]

    def score(model: nn.Module) -> list[float]:
        now = outputs(model)
        if not whole:
            whole.extend(now)
            enabled, state.enabled = state.enabled, False
            try:
                scale.extend(max(float((b - y).square().sum()), 1e-30) for b, y in zip(outputs(model), whole, strict=True))
            finally:
                state.enabled = enabled
        return [-float((a - y).square().sum()) / s for a, y, s in zip(now, whole, scale, strict=True)]

    return score


def _output(out: Any) -> torch.Tensor:
    """The logits, or else the first tensor that a model returned."""
    if isinstance(out, torch.Tensor):
        return out
    if hasattr(out, "keys"):
        return out["logits"] if "logits" in out else next(v for v in out.values() if isinstance(v, torch.Tensor))
    return out[0]


def _numbers(value: Any, what: str) -> list[float]:
    """What `score` gave, as a list. Raises: PlanError where it holds no number, or one that is not finite."""
    try:
        out = [float(v) for v in value] if hasattr(value, "__len__") or (isinstance(value, torch.Tensor) and value.dim()) else [float(value)]
    except (TypeError, ValueError):
        out = []
    if not out or not all(math.isfinite(v) for v in out):
        raise PlanError(f"the score of {what} is not a finite number", fix="Let score return a number, or one for each example, higher for better")
    return out


def added(model: nn.Module, state: Any, record: Record, on: list[Any], means: dict[int, Any], batch: Any) -> float:
    """What the parts `on`, with constant gates, add to a call on `batch`, as a share of the call with no gated part."""
    gated = [p for p in record.parts if p.gate is not None]
    old, active = [p.gate for p in gated], state.active
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        state.active = (record.name,)
        for p in gated:
            p.gate = constant(p.gate, means[id(p)]["mean"])
        with evaluating(model):
            for turn in range(2 * ROUNDS + 2):
                full = bool(turn % 2)
                off = [p for p in gated if not full or not any(p is q for q in on)]
                seconds = _without(model, state, off, lambda: _timed(model, batch))
                if turn > 1:  # the first of each warms up
                    times[full].append(seconds)
    finally:
        for p, g in zip(gated, old, strict=True):
            p.gate = g
        state.active = active
        state.refresh()
    return max(0.0, statistics.median(times[True]) / statistics.median(times[False]) - 1)


def _timed(model: nn.Module, batch: Any) -> float:
    device = device_of(model)
    with torch.no_grad():
        wait(device)
        begin = time.perf_counter()
        call(model, batch)
        wait(device)
    return time.perf_counter() - begin


def _without(model: nn.Module, state: Any, parts: list[Any], run: Callable[[], Any]) -> Any:
    """What `run` gives with `parts` switched off."""
    names = [p.adapter for p in parts]
    for p in parts:
        p.adapter = ""
    state.refresh()
    try:
        return run()
    finally:
        for p, n in zip(parts, names, strict=True):
            p.adapter = n
        state.refresh()


def constant(gate: Gate, mean: float) -> Gate:
    mean = min(max(mean, 1e-6), 1 - 1e-6)
    new = {"device": gate.bias.device, "dtype": gate.bias.dtype}
    bias = float(torch.logit(torch.tensor(mean, dtype=torch.float64)))
    return Gate(gate.width, per="constant", bias=bias, temperature=1.0, causal=False, new=new)
