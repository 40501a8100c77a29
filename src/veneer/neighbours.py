"""AdamW that updates tensors which lie side by side in memory as one tensor.

The arithmetic is elementwise, so neighbours with the same number of steps behind them need no kernel of their own. All else
is torch's: a state for each parameter, groups, options, what is saved. Parameters without a gradient in a step are left out
of it, as ever, and what lies on both sides of them is then updated by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

address, grad = Tensor.data_ptr, attrgetter("grad")
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole(ts: Sequence[Tensor]) -> Tensor | None:
    """One flat tensor of all `ts`, where they lie side by side in this order in one storage; None where they do not."""
    first = ts[0]
    end, size = first.data_ptr(), first.element_size()
    for t in ts:
        if t.data_ptr() != end or t.dtype != first.dtype or not t.is_contiguous():
            return None
        end += t.numel() * size
    return span(first, (end - first.data_ptr()) // size)


def span(first: Tensor, numel: int) -> Tensor | None:
    """`numel` numbers from where `first` begins; None where its storage has not as many."""
    start = first.storage_offset()
    if (start + numel) * first.element_size() > first.untyped_storage().nbytes():
        return None
    return first.detach().as_strided((numel,), (1,), start)


class Run:
    """Parameters that lie side by side, as do their gradients."""

    def __init__(self, ps: list[Tensor], gs: list[Tensor], step: Tensor, states: list[dict[str, Tensor]]) -> None:
        base = gs[0].data_ptr()
        self.offsets, self.numel = [address(g) - base for g in gs], sum(p.numel() for p in ps)
        p = whole(ps)
        assert p is not None
        self.p, self.step = ps[0] if len(ps) == 1 else p, step
        self.state, self.kept = states[0], []
        for key in MOMENTS:
            flat = states[0][key] if len(ps) == 1 else whole([s[key] for s in states])
            if flat is None:
                flat = torch.cat([s[key].flatten() for s in states])
                for s, p, v in zip(states, ps, flat.split([p.numel() for p in ps]), strict=True):
                    s[key] = v.view(p.shape)
            self.kept.append(flat)
        self.first = [states[0][key] for key in MOMENTS]

    def gradient(self, gs: list[Tensor], at: list[int]) -> Tensor | None:
        """The run's gradient; None where it does not lie as before."""
        base = at[0]
        if any(self.state.get(key) is not t for key, t in zip(MOMENTS, self.first, strict=True)) or [a - base for a in at] != self.offsets:
            return None
        return gs[0] if len(gs) == 1 else span(gs[0], self.numel)


class Plan:
    """One group's parameters with a gradient, in the order of their memory, as runs."""

    def __init__(self, ps: list[Tensor], gs: list[Any], state: Any) -> None:
        self.given, self.addresses = ps, list(map(address, ps))
        self.none = [g is None for g in gs]
        self.order = sorted((i for i, none in enumerate(self.none) if not none), key=self.addresses.__getitem__)
        ps, gs = ([ts[i] for i in self.order] for ts in (ps, gs))
        for p in ps:
            if not state[p]:
                state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for key in MOMENTS:
                    state[p][key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [state[p] for p in ps]
        # every parameter counts its own steps, and all of them are in one tensor
        self.steps: list[tuple[Tensor, Tensor]] = []
        done = [0.0] * len(ps)
        for device in dict.fromkeys(p.device for p in ps):
            own = [i for i, p in enumerate(ps) if p.device == device]
            count = torch.stack([states[i]["step"].to(device) for i in own])
            for i, one, value in zip(own, count.unbind(0), count.tolist(), strict=True):
                states[i]["step"], done[i] = one, value
            self.steps.append((count, torch.ones_like(count)))
        cuts = [0, *(i for i in range(1, len(ps)) if not (_next(ps[i - 1], ps[i]) and _next(gs[i - 1], gs[i]) and done[i - 1] == done[i])), len(ps)]
        self.runs: list[Run] = []
        self.bounds = list(zip(cuts, cuts[1:], strict=False)) if ps else []
        firsts = {id(states[i]["step"]) for i, _ in self.bounds}
        for i, k in self.bounds:
            self.runs.append(Run(ps[i:k], gs[i:k], states[i]["step"], states[i:k]))
        for device_steps, (count, more) in zip(self._by_device(ps, states), self.steps, strict=True):
            # torch's own code counts the first of each run
            more.copy_(torch.tensor([float(id(s) not in firsts) for s in device_steps], device=count.device))
        self.ps = ps

    def _by_device(self, ps: list[Tensor], states: list[Any]) -> list[list[Tensor]]:
        return [[s["step"] for p, s in zip(ps, states, strict=True) if p.device == device] for device in dict.fromkeys(p.device for p in ps)]

    def gradients(self, ps: list[Tensor], gs: list[Any]) -> list[Tensor] | None:
        """Those of the runs; None where the plan is for other tensors, or for others with a gradient."""
        if len(ps) != len(self.given) or not all(map(is_, ps, self.given)) or list(map(address, ps)) != self.addresses:
            return None
        if [g is None for g in gs] != self.none:
            return None
        own = [gs[i] for i in self.order]
        at, out = list(map(address, own)), []
        for run, (i, k) in zip(self.runs, self.bounds, strict=True):
            g = run.gradient(own[i:k], at[i:k])
            if g is None:
                return None
            out.append(g)
        return out


def _next(a: Tensor, b: Tensor) -> bool:
    """Whether b begins where a ends, in the same storage."""
    if b.data_ptr() != a.data_ptr() + a.nbytes or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_contiguous() and b.is_contiguous() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with one update for neighbours in memory; arguments, state and results are torch's."""

    _plans: dict[int, Plan]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def _init_group(self, group: dict[str, Any], params: list[Any], grads: list[Any], *lists: Any) -> bool:  # type: ignore[override]
        """Fill torch's lists for its update: with runs in place of parameters."""
        ps = group["params"]
        gs = list(map(grad, ps))
        if not group["fused"] or any(group[key] for key in ("amsgrad", "capturable", "differentiable")):
            return super()._init_group(group, params, grads, *lists)
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.get(id(group))
        found = None if plan is None else plan.gradients(ps, gs)
        if found is None:
            if any(p.is_complex() for p in ps) or any(g is not None and g.layout != torch.strided for g in gs):
                return super()._init_group(group, params, grads, *lists)
            plan = plans[id(group)] = Plan(list(ps), gs, self.state)
            found = plan.gradients(ps, gs)
        assert plan is not None and found is not None
        first, second, _, steps = lists
        params += [run.p for run in plan.runs]
        grads += found
        first += [run.kept[0] for run in plan.runs]
        second += [run.kept[1] for run in plan.runs]
        steps += [run.step for run in plan.runs]
        off = getattr(self, "found_inf", None)  # a GradScaler's: where it is 1, torch takes the step back
        for count, more in plan.steps:
            count += more if off is None else more * (1 - off.to(count.device))
        torch.autograd.graph.increment_version(plan.ps)  # torch's fused kernels do not count the change that they make
        return False
