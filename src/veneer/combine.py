"""Combining: a new adapter from trained ones, as a weighted sum of what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Record, known_names
from .attach import check_free, check_name, join, state_of
from .build import make_parts
from .errors import AdapterError, CapabilityError, PlanError, did_you_mean
from .methods import holder
from .methods.part import module_at
from .methods.parts import MapPart
from .ops.maps import take
from .plan import Plan, finite, short, whole
from .sites import Site
from .static import narrow


@dataclass
class Combined:
    """What combining made: the handle, its rank (0: the methods' own form), and the largest relative error
    ‖ΔW - BA‖ / ‖ΔW‖ over its matrices."""

    adapter: Adapter
    how: str
    rank: int
    error: float

    def __str__(self) -> str:
        return f"{self.adapter!r} by {self.how}" + (f", rank {self.rank}, relative error at most {self.error:.2e}" if self.rank else "")

    __repr__ = __str__


def combine(
    model: nn.Module,
    weights: Mapping[str, float] | Sequence[str],
    name: str,
    how: str = "linear",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    activate: bool = True,
) -> Combined:
    """Make the adapter `name` out of attached ones, without data; they stay as they are.

        linear     θ = Σ_k w_k θ_k, of every parameter: adapters of the same plan, of any methods (a soup)
        cat        ΔW = Σ_k w_k ΔW_k exactly, as one LoRA of rank Σ_k r_k: A stacked, B side by side
        svd        the closest matrix of rank `rank` to Σ_k w_k ΔW_k
        ties       each ΔW_k trimmed to its `density` largest entries; for every entry the sign with the larger weighted sum
                   is elected, and the entries of that sign are averaged; then svd (Yadav et al., NeurIPS 2023,
                   arXiv 2306.01708)
        dare       each entry of ΔW_k dropped with probability 1 - density, the rest divided by density (Yu et al., ICML 2024,
                   arXiv 2311.03099), summed with the weights; then svd.   dare-ties: dropped so, then elected as in ties

    weights  name -> w_k, or names (1/K each, as a mean)
    rank     of the result for svd, ties and dare; default: the largest of the adapters' own
    density  share of entries that stay, 0.5 by default (TIES: 0.2; DARE: 0.1 to 0.9)
    seed     of DARE's drops

    All but 'linear' take what is linear in the weights, of any method, and give a LoRA (and vn.Full for tensors that are
    no maps, as norms and heads). Returns the handle with the rank and what the rank lost. Raises: AdapterError for unknown
    names; CapabilityError for gates, stacks, and methods that are not linear in the weights or change biases, and for
    'linear' over different plans;
    PlanError for options out of range. Then nothing is attached.
    """
    state = state_of(model)
    names = known_names(state, list(weights))
    if not names:
        raise AdapterError("combine needs adapters", fix="Name some: vn.combine(model, ['sst2', 'mnli'], name='both')")
    share = {n: float(w) if finite(w) else _number(n, w) for n, w in weights.items()} if isinstance(weights, Mapping) else dict.fromkeys(names, 1 / len(names))
    if how not in HOW:
        raise PlanError(f"combine: how is {short(how)}", fix=did_you_mean(str(how), HOW))
    if not finite(density) or not 0 < density <= 1:
        raise PlanError(f"combine: density must be over 0 and at most 1, not {short(density)}")
    if rank is not None and not whole(rank):
        raise PlanError(f"combine: rank must be a whole number of at least 1, not {short(rank)}")
    check_name(name)
    check_free(model, name)
    records = [state.adapters[n] for n in names]
    with torch.no_grad():
        if how == "linear":
            plan, fill, found, error = _soup(records, share)
        else:
            plan, fill, found, error = _matrices(model, records, share, how, rank, density, seed)
        parts = make_parts(model, plan)
        fill(parts)
    return Combined(join(model, Record(name, plan, parts), activate), how, found, error)


HOW = ("linear", "cat", "svd", "ties", "dare", "dare-ties")


def _number(name: str, value: Any) -> float:
    raise PlanError(f"combine: the weight of {name!r} must be a finite number, not {short(value)}")


def _soup(records: list[Record], share: dict[str, float]) -> tuple[Plan, Callable[[list[Any]], None], int, float]:
    first = records[0]
    for r in records[1:]:
        if r.plan != first.plan:
            raise CapabilityError(f"{first.name!r} and {r.name!r} have different plans, and 'linear' adds parameter by parameter", fix="Use how='svd' or 'cat'")

    def fill(parts: list[Any]) -> None:
        for i, part in enumerate(parts):
            for key, p in part.named_parameters():
                p.copy_(sum(share[r.name] * dict(r.parts[i].named_parameters())[key] for r in records))
            own = dict(part.named_buffers())
            for key, b in first.parts[i].named_buffers():
                if key in own:
                    own[key].copy_(b)

    return first.plan, fill, 0, 0.0


def _matrices(
    model: nn.Module, records: list[Record], share: dict[str, float], how: str, rank: int | None, density: float, seed: int
) -> tuple[Plan, Callable[[list[Any]], None], int, float]:
    found: dict[Site, list[tuple[float, Tensor, Any]]] = {}
    for r in records:
        _linear(r)
        for p in r.parts:
            if p.acts:
                found.setdefault(p.site, []).append((share[r.name], _delta(model, p), p))
    maps = {s: ds for s, ds in found.items() if s.port == "weight"}
    tensors = {s: ds for s, ds in found.items() if s.port != "weight"}
    generator = torch.Generator().manual_seed(seed)
    low: dict[Site, tuple[Tensor, Tensor]] = {}
    error, width = 0.0, 0
    for site, deltas in maps.items():
        if how == "cat":
            parts = []
            for w, _, p in deltas:
                factors = _factors(p)
                if factors is None:
                    raise CapabilityError(f"{p.method_name} has no low-rank factors to put side by side", where=site.path, fix="Use how='svd'")
                parts.append((w, factors))
            low[site] = torch.cat([a for _, (a, _, _) in parts], -2), torch.cat([w * s * b for w, (_, b, s) in parts], -1)
        else:
            whole = _sum(deltas, how, density, generator)
            r = rank or max((f[0].shape[-2] for _, _, p in deltas if (f := _factors(p)) is not None), default=0)
            if not r:
                raise PlanError(f"combine: {deltas[0][2].method_name} has no rank of its own", where=site.path, fix="Give one: rank=16")
            low[site], lost = _low_rank(whole, min(r, *whole.shape[-2:]))
            error = max(error, lost)
        width = max(width, low[site][0].shape[-2])
    plans: list[Plan] = []
    if maps:
        plans.append(holder("factors")(width, alpha=width, at=narrow(model, list(maps))))
    if tensors:
        plans.append(holder("tensor")(at=narrow(model, list(tensors))))

    def fill(parts: list[Any]) -> None:
        for part in parts:
            if part.site in low:
                a, b = low[part.site]
                more = width - a.shape[-2]
                part.begin(nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more)))
            elif part.site in tensors:
                part.add(_sum(tensors[part.site], "svd" if how == "cat" else how, density, generator))

    plan = plans[0] if len(plans) == 1 else plans[0] + plans[1]
    return plan, fill, width, error


def _linear(r: Record) -> None:
    """Raise CapabilityError unless the adapter is a sum of what is linear in the weights."""
    if r.plan.depth() > 1:
        raise CapabilityError(f"{r.name!r} is a stack, whose later methods see what the earlier make, so it is no sum of matrices", fix="Use how='linear'")
    for term in r.plan.terms():
        if not term.method.mergeable or term.gate is not None:
            what = "a gate" if term.gate is not None else "not linear in the weights"
            raise CapabilityError(f"{term.method.name} (in {r.name!r}) is {what}, so it is no sum of matrices", fix="Use how='linear', or vn.settle its gates")


def _delta(model: nn.Module, p: Any) -> Tensor:
    """What the part adds to its tensor, in fp32: canonical for a map."""
    if isinstance(p, MapPart):
        bias = p.module._parameters.get("bias")
        dw, db = p.fold(p.weight().float(), None if bias is None else take(bias.detach().float(), p.site.slice))
        if db is not None and bool(db.any()):
            raise CapabilityError(f"{p.method_name} changes a bias too, which no LoRA holds", where=p.site.path, fix="Use how='linear'")
        return dw.float()
    base = module_at(model, p.site.path)._parameters[p.site.tensor]
    assert base is not None
    return (p.value(base) - base).float()


def _factors(p: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of ΔW = s · B A in fp32, where the part is of that form."""
    factors = getattr(p, "factors", None)
    return None if factors is None else factors(torch.empty(0))


def _sum(deltas: list[tuple[float, Tensor, Any]], how: str, density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum of matrices, trimmed, dropped and elected as `how` says."""
    kept = [(w, d) for w, d, _ in deltas]
    if how.startswith("dare"):
        kept = [(w, d * (torch.rand(d.shape, generator=generator) < density).to(d) / density) for w, d in kept]
    elif how == "ties":
        kept = [(w, _trim(d, density)) for w, d in kept]
    if not how.endswith("ties"):
        return torch.stack([w * d for w, d in kept]).sum(0)
    scaled = torch.stack([w * d for w, d in kept])
    agrees = torch.sign(scaled) == torch.sign(scaled.sum(0))
    count = torch.stack([a * abs(w) for a, (w, _) in zip(agrees.to(scaled.dtype), kept, strict=True)]).sum(0)
    total = sum(abs(w) for w, _ in kept)
    # the mean over those that agree, at the weight of all: equal adapters give themselves back
    return (scaled * agrees).sum(0) / count.clamp(min=1e-12) * total


def _trim(d: Tensor, density: float) -> Tensor:
    """`d` with all but the largest share of its entries set to zero."""
    k = max(1, round(density * d.numel()))
    least = d.abs().flatten().kthvalue(d.numel() - k + 1).values
    return torch.where(d.abs() >= least, d, 0)


def _low_rank(w: Tensor, r: int) -> tuple[tuple[Tensor, Tensor], float]:
    """(A, B) of rank r with BA closest to w, and the share of w's norm that is lost."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = s[..., :r].sqrt()
    lost = float(s[..., r:].square().sum().sqrt() / s.square().sum().sqrt().clamp(min=1e-30))
    return (root.unsqueeze(-1) * v[..., :r, :], u[..., :r] * root.unsqueeze(-2)), lost
