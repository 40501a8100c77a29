"""Settling: learnt gates become constants, small parts are dropped, and what is left is an ordinary static adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ablate import added, by_outputs, losses_of
from .adapter import Record
from .attach import state_of
from .errors import CapabilityError, PlanError, did_you_mean
from .files import write_whole
from .gates import gates
from .keep import Keep, choose
from .plan import Plan, finite, short
from .static import rebuild, remember

BY = ("role", "layer")


@dataclass
class SettleReport:
    """What settling did.

    plan    the static plan that is attached now
    parts   dicts, one for each group of parts: method, module (role), layers, mean and std (over examples) of its gate,
            parameters, merges, kept, and `loss` with `loss_std`: the score lost by removing the group, and the standard error
            of that over the held-out examples (None where no `score` was given, or it was one number)
    before, after   trainable parameters
    latency         what the kept parts that do not merge add to a call, as a share; None where no latency was asked for
    rewound         the seed that the kept parts started anew from; None where their trained numbers were kept
    scored          how often `score` ran
    steps           optimiser steps that `retune` took; None without one
    """

    plan: Plan
    parts: list[dict[str, Any]]
    before: int
    after: int
    name: str
    latency: float | None = None
    rewound: int | None = None
    scored: int = 0
    steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all. Raises: StoreError."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return Path(path)

    def __str__(self) -> str:
        lines = [f"{'method':<14}{'module':<12}{'gate':>14}{'parameters':>12}  {'loss if removed':>16}  kept"]
        for p in self.parts:
            loss = "-" if p["loss"] is None else f"{p['loss']:+.4f}" + ("" if p["loss_std"] is None else f"±{p['loss_std']:.4f}")
            place = p["module"] if len(p["layers"]) != 1 else f"{p['module']}@{p['layers'][0]}"
            lines.append(f"{p['method']:<14}{place:<12}{p['mean']:>8.3f}±{p['std']:.3f}{p['parameters']:>12,}  {loss:>16}  {'yes' if p['kept'] else 'no'}")
        more = "" if self.latency is None else f", +{100 * self.latency:.1f}% latency"
        lines.append(f"{self.before:,} -> {self.after:,} trainable parameters{more}")
        start = "gates folded into the trained numbers" if self.rewound is None else f"started anew (seed {self.rewound})"
        trained = "" if self.steps is None else f", retuned for {self.steps:,} steps"
        lines.append(f"{start}{trained}; the score ran {self.scored:,} times")
        return "\n".join(lines)

    __repr__ = __str__


def settle(
    model: nn.Module,
    batches: Iterable[Any],
    keep: int | float | str | dict[str, Any] | None = None,
    name: str | None = None,
    *,
    threshold: float = 0.0,
    score: Callable[[nn.Module], float | Sequence[float]] | str | None = None,
    by: str = "role",
    retune: Callable[[nn.Module], Any] | None = None,
    rewind: bool = False,
    seed: int = 0,
) -> SettleReport:
    """Turn the gated adapter `name` into the smaller static one that its gates point to, in place.

    The gates are measured on `batches`; each becomes its mean there. Groups of parts (one method in one role, as LoRA at
    attn.q, over all layers) are ranked by mean gate, or, where `score` is given, by what removing them takes from it; those
    outside `keep` or under `threshold` are dropped. A gate's size is a poor guide, since a part may be large under a small
    gate (docs/evidence.md): give `score` where you can. Constants are folded into the parameters
    (LoRA's B, a bottleneck's W_up, (IA)3's l - 1, a bias' delta); a prefix keeps a constant gate. Ungated parts, such as
    a head, stay. The result merges wherever its methods do.

        folded     δ_m(x; θ_m(T)) · g_m(x)  ->  δ_m(x; ḡ_m θ_m(T))        ḡ_m the mean gate, T the last step
        rewound    δ_m(x; θ_m(T)) · g_m(x)  ->  δ_m(x; θ_m(0))            and `retune` trains them

    Parts that were trained under gates and beside others miss both, and what `retune` can do briefly does not make up for it;
    the same parts trained alone from their start can (docs/evidence.md), at the cost of one more training. In the literature on
    pruning this is rewinding to step 0 (Frankle & Carbin, ICLR 2019; Renda et al., ICLR 2020, arXiv 2003.02389), here with
    fresh numbers, as what pruning finds is the structure (Liu et al., ICLR 2019, arXiv 1810.05270).

    keep       an int: that many groups; a float in (0, 1]: groups up to that share of the gated parameters, the best first or
               the best for their size first, whichever keeps more worth (Dantzig 1957);
               'latency:+5%': best first, while a call on the first batch takes at most 5% more than without them (measured),
               where methods that merge cost nothing, so 'latency:+0%' keeps only those; or a dict of these three
    threshold  drop groups whose mean gate is under it (0: none)
    score      model -> float, higher is better, on held-out data; or one float for each example (or fold) there, and the
               report then gives the spread of the loss too; runs once for each group, and once for the whole.
               'outputs': no labels needed; minus ‖y - y_whole‖² / ‖y_base - y_whole‖² for the model's outputs y on each of
               `batches`, so 0 is the whole adapter and -1 as far off as the base without it
    by         'role': a method in one role over all layers is one group; 'layer': in each layer by itself, which holds to a
               limit more closely, at one run of `score` for each
    retune     model -> None: a training of what is left, brief, or, with `rewind`, a whole one. Make its optimiser in it. The
               report counts the steps of torch's optimisers; where those are not its steps (CUDA graphs), let it return the
               number
    rewind     True: what is kept starts anew, with no gates, as vn.attach(model, report.plan) starts it under
               torch.manual_seed(seed), ungated parts (a head) too; what vn.frozen holds stays. Methods whose start depends on
               data see `batches`, with labels if they want a gradient
    seed       of that start, in the report as `rewound`

    Raises: CapabilityError (no gates, or batches that do not reach all of them), PlanError (a `keep` that leaves nothing, a
    score that is no number, `rewind` and nothing that trains), AdapterError (merged, or unknown). After an error, also of
    `score` or `retune`, the adapter is as before.
    """
    limits = Keep.parse(keep)
    if not finite(threshold):
        raise PlanError(f"threshold={short(threshold)}", fix="Give a number from 0 to 1")
    if by not in BY:
        raise PlanError(f"by is {short(by)}", fix=did_you_mean(str(by), BY))
    if not isinstance(rewind, bool) or not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise PlanError(f"rewind={short(rewind)}, seed={short(seed)}", fix="Give rewind=True and a whole number as the seed of the new start")
    if rewind and retune is None:
        raise PlanError("rewind starts what is kept anew, and nothing would train it", fix="Give retune=, a function of the model that trains it")
    batches = list(batches)
    state = state_of(model)
    report = gates(model, batches, name=name)
    name = report.adapter
    record: Record = state.adapters[name]
    gated = [p for p in record.parts if p.gate is not None]
    for term in record.plan.terms():
        if term.gate is not None and not term.gate.settles:
            raise CapabilityError(
                f"{term.method.name} is weighed by attention (vn.fuse), which no constant can stand for", fix="Use vn.gated or vn.mixture to settle"
            )
    means = {id(p): row for p, row in zip(gated, report.rows, strict=True)}
    for row in report.rows:
        if not math.isfinite(row["mean"]):
            what = "no batch reaches this part" if not row["n"] else "the gate is not a number"
            raise CapabilityError(f"{row['method']}: {what}", where=row["path"], fix="Give batches as in training, from an adapter that is whole")
    groups: dict[tuple[str, ...], list[Any]] = {}
    for p in gated:
        groups.setdefault(group_of(p, by), []).append(p)
    if isinstance(score, str):
        score = by_outputs(score, state, batches)
    losses: dict[Any, tuple[float | None, float | None]] = (
        dict.fromkeys(groups, (None, None)) if score is None else losses_of(model, state, record, groups, score)
    )
    rows: list[dict[str, Any]] = []
    terms = list(record.plan.terms())
    for key, parts in groups.items():
        own = [means[id(p)] for p in parts]
        rows.append(
            {
                "method": key[0], "module": parts[0].site.role, "layers": [p.site.layer for p in parts],
                "mean": sum(r["mean"] for r in own) / len(own), "std": sum(r["std"] for r in own) / len(own),
                "parameters": sum(q.numel() for p in parts for k, q in p.named_parameters() if not k.startswith("gate.")),
                "loss": losses[key][0], "loss_std": losses[key][1],
                "merges": all(terms[p.term].method.mergeable for p in parts), "kept": True,
            }
        )  # fmt: skip
    members = list(groups.values())

    def measure(numbers: list[int]) -> float:
        return added(model, state, record, [p for i in numbers for p in members[i]], means, batches[0])

    latency = choose(rows, limits, threshold, measure)
    kept = {id(p) for r, parts in zip(rows, members, strict=True) if r["kept"] for p in parts}
    stay = [p for p in record.parts if p.gate is None or id(p) in kept]
    stay = [p for p in stay if p.acts or any(q.bank is p for q in stay)]  # a bank goes with the last part that uses it
    before = sum(q.numel() for p in record.parts for q in p.parameters())
    undo = remember(model, state, record)
    try:
        rebuild(model, state, record, stay, means, batches, seed if rewind else None)
        steps = None if retune is None else counted(retune, model)
    except BaseException:
        undo()
        raise
    after = sum(q.numel() for p in record.parts for q in p.parameters())
    runs = 0 if score is None else 1 + len(groups)
    return SettleReport(record.plan, rows, before, after, name, latency, seed if rewind else None, runs, steps)


def counted(retune: Callable[[nn.Module], Any], model: nn.Module) -> int:
    """The steps that `retune` says it took, or else those of torch's optimisers while it ran."""
    taken = [0]

    def count(*_: Any) -> None:
        taken[0] += 1

    hook = register_optimizer_step_post_hook(count)
    try:
        told = retune(model)
    finally:
        hook.remove()
    return told if isinstance(told, int) and not isinstance(told, bool) else taken[0]


def group_of(part: Any, by: str) -> tuple[str, ...]:
    """What `part` stays or goes with."""
    s = part.site
    return (part.method_name, s.role) if by == "role" else (part.method_name, f"{s.tower}/{s.role}@{s.layer}".lstrip("/"))
