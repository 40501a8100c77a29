"""Choosing among trials: dominance, the Pareto front, hypervolume, PEFT-Bench's score, and the recommended one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from .report import OBJECTIVES, Trial

# Differences within these shares are measurement, not merit: times are medians over repeated runs, the rest is exact.
RESOLUTION = {"score": 0.0, "parameters": 0.0, "latency": 0.02, "memory": 0.01, "seconds": 0.1}


def full(trials: Sequence[Trial], objectives: Sequence[str] = ("score",)) -> list[Trial]:
    """The trials that were trained in full and have all of `objectives`."""
    return [t for t in trials if t.status == "complete" and all(k in t.objectives for k in objectives)]


def better(a: Trial, b: Trial, objective: str) -> int:
    """1 where a is better than b in `objective` beyond what measuring resolves, -1 where b is, else 0."""
    x, y = a.objectives[objective], b.objectives[objective]
    if abs(x - y) <= RESOLUTION[objective] * max(abs(x), abs(y)):
        return 0
    return 1 if (x > y) == OBJECTIVES[objective] else -1


def dominates(a: Trial, b: Trial, objectives: Sequence[str]) -> bool:
    """Whether a is nowhere worse than b and somewhere better."""
    signs = [better(a, b, k) for k in objectives]
    return min(signs) >= 0 and max(signs) > 0


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Those trained in full that no other dominates, cheapest in parameters first."""
    own = full(trials, objectives)
    kept = [t for t in own if not any(dominates(o, t, objectives) for o in own)]
    return sorted(kept, key=lambda t: (t.objectives.get("parameters", 0.0), -t.score, t.number))


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that `points` (score, cost) dominate, against `reference` (the worst score, the largest cost that count).

        HV = ∫ (best score at a cost of at most c, less the reference's) dc,   c up to the reference's cost

    Zitzler & Thiele 1998. Costs are best given as logarithms where they span magnitudes, as parameters do.
    """
    floor, ceiling = reference
    inside = sorted((c, s) for s, c in points if s > floor and c < ceiling)
    area, best = 0.0, floor
    for i, (cost, score) in enumerate(inside):
        best = max(best, score)
        after = inside[i + 1][0] if i + 1 < len(inside) else ceiling
        area += (best - floor) * (after - cost)
    return area


def pscp(score: float, parameters: float, latency: float, memory: float, *, scales: tuple[float, float, float], weights: tuple[float, float, float]) -> float:
    """PEFT Soft Score Penalties (PEFT-Bench; Belanec et al. 2025, arXiv 2511.21285).

        PSCP = P · (1 + M_p / C_p)^(-β_p) · (1 + M_f / C_f)^(-β_f) · (1 + M_m / C_m)^(-β_m)

    P        the task's score, in [0, 1], higher is better
    M_p      trainable parameters; M_f: cost of inference; M_m: memory of training
    scales   C_p, C_f, C_m: what counts as much in each; a cost of that size halves the score where β is 1
    weights  β_p, β_f, β_m

    The paper compares methods on billions of parameters and sets the scales for that. Here they are the base's own
    numbers: its parameters, its inference time (M_f is what the adapter adds), and the memory of training all of it
    (run.py), so that the score means the same on every model.
    """
    out = score
    for cost, scale, weight in zip((parameters, latency, memory), scales, weights, strict=True):
        out *= (1 + max(cost, 0.0) / scale) ** -weight
    return out


def lead(best: Trial, other: Trial) -> tuple[float, float]:
    """(lead of `best` over `other` in score, its standard error): paired over the same draws of evaluation examples."""
    gap = best.score - other.score
    if len(best.replicates) == len(other.replicates) > 1:
        return gap, stdev([a - b for a, b in zip(best.replicates, other.replicates, strict=True)])
    return gap, math.hypot(best.noise, other.noise)


def recommend(trials: Sequence[Trial]) -> tuple[Trial, str]:
    """(the recommended trial, why): the best score, and, among those that tie with it, the cheapest.

    A trial ties with the best where the best's lead is at most one standard error of the paired difference over the
    evaluation examples (the one-standard-error rule of Breiman et al. 1984, paired). Cheapest: fewest trainable parameters,
    then the lower latency. Raises: ValueError where nothing was scored.
    """
    own = full(trials) or [t for t in trials if t.status in ("unfinished", "dropped") and math.isfinite(t.score)]
    if not own:
        raise ValueError("no trial has a score")
    best = max(own, key=lambda t: (t.score, -t.objectives.get("parameters", 0.0), -t.number))
    tied = [t for t in own if t is best or (gap := lead(best, t))[0] <= gap[1]]
    cheapest = min(tied, key=lambda t: (t.objectives.get("parameters", math.inf), t.objectives.get("latency", math.inf), t.number))
    if cheapest is best:
        others = f"; {len(tied) - 1} tie with it and none is cheaper" if len(tied) > 1 else ""
        return best, f"the best score, {best.score:.4f}{others}"
    gap, error = lead(best, cheapest)
    why = f"{cheapest.score:.4f} is {gap:.4f} below the best, within one standard error ({error:.4f}), and the cheapest of {len(tied)} that tie"
    return cheapest, why


def ranked(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of `points` (score, cost), best first: front by front, and within a front by the hypervolume that would be
    lost without the point, so that what drops out first is what the front can spare."""
    left, out = list(range(len(points))), []
    while left:
        layer = [i for i in left if not any(_below(points[i], points[j]) for j in left)]
        floor, ceiling = min(p[0] for p in points) - 1e-9, max(p[1] for p in points) + 1.0
        whole = hypervolume([points[i] for i in layer], (floor, ceiling))
        loss = {i: whole - hypervolume([points[j] for j in layer if j != i], (floor, ceiling)) for i in layer}
        out += sorted(layer, key=lambda i: (-loss[i], i))
        left = [i for i in left if i not in layer]
    return out


def _below(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return b[0] >= a[0] and b[1] <= a[1] and b != a


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation); the deviation of one value is 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
