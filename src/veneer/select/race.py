"""Racing: candidates train together on one base, each as if it were alone.

    batch  = rows of candidate 1 | rows of candidate 2 | … | rows of candidate K      (one forward, one backward)
    L      = sum over candidates of (mean loss over its own rows)

A deviation acts on its own rows only (`vn.route`), so dL/dθ_k is the gradient of candidate k's own mean loss, and its clipping,
optimiser and schedule read nothing else. K candidates share the base's forward and backward, which pays where one candidate's
batch leaves the machine idle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import activate, active
from ..attach import attach, detach
from ..errors import ConfigError, VeneerError, did_you_mean
from ..plan import Plan, short
from .heats import Heats, gpus
from .lanes import Candidate, Lane, Record
from .rows import Judge, Loss, Order, Rows, loss_of

KEEP = ("winner", "all", "none")
SPARE = ("time", "rows")
SHOWN = 8  # batches that methods whose start depends on data are shown


@dataclass
class RaceReport:
    """What a race gave; plain data but for the plan.

    candidates  name -> Record: status, scores, losses, parameters, examples, seconds, note
    winner      the name of the best score among those that neither diverged nor were dropped; None if none is left
    batches     (first step, rows) pairs: the batch size of each candidate; racing one candidate alone with batch=this, the
                same seed and steps gives the same weights
    rungs       (step, survivors) pairs of successive halving
    seconds     of the whole race, evaluation included
    """

    candidates: dict[str, Record]
    winner: str | None
    steps: int
    batches: list[tuple[int, int]]
    rungs: list[tuple[int, int]]
    seconds: float
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan | None:
        """The winner's plan."""
        return None if self.winner is None else Plan.from_dict(self.candidates[self.winner].plan)

    @property
    def scores(self) -> dict[str, float | None]:
        return {n: r.best for n, r in self.candidates.items()}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(9, *(len(n) for n in self.candidates))
        lines = [f"{'candidate':<{width}}  {'score':>8}  {'at step':>7}  {'parameters':>11}  {'examples':>8}  {'seconds':>7}  status"]
        order = sorted(self.candidates.values(), key=lambda r: (r.best is not None, r.best or 0.0), reverse=True)
        for r in order:
            score = "-" if r.best is None else f"{r.best:.4f}"
            note = f" ({r.note})" if r.note else ""
            mark = "*" if r.name == self.winner else " "
            lines.append(f"{r.name:<{width}}{mark} {score:>8}  {r.best_step:>7}  {r.parameters:>11,}  {r.examples:>8,}  {r.seconds:>7.1f}  {r.status}{note}")
        return "\n".join(lines)

    __repr__ = __str__


def race(
    model: nn.Module,
    candidates: Mapping[str, Plan | Candidate | Any],
    train: Any,
    evaluate: Any,
    *,
    steps: int,
    batch: int | Sequence[tuple[int, int]] = 16,
    eval_batch: int = 64,
    evaluate_every: int | None = None,
    halving: int = 0,
    finalists: int = 1,
    spare: str = "time",
    together: bool = True,
    max_rows: int | None = None,
    graph: bool = False,
    best: bool = True,
    loss: Loss | None = None,
    metric: Callable[[Tensor, Tensor], float] | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: str = "winner",
    on_step: Callable[[int, dict[str, Record]], None] | None = None,
) -> RaceReport:
    """Train `candidates` together on `model`, and say which scores best.

    Each candidate reads the same examples in the same order (epochs shuffled by `seed`), starts from the numbers that it would
    start from alone, and takes its own optimiser steps: its weights equal those of a race with it alone to rounding. That holds
    where the base computes each example by itself; with dropout the masks are drawn for the whole batch, and batch norms mix rows.

    candidates      name -> plan, or Candidate(plan, lr=…, clip=…, patience=…)
    train           a list of dicts (input_ids, labels, …), padded here, or one dict of tensors, an example in each row
    evaluate        held-out examples of the same kind; or model -> float, higher is better, called with one candidate active
    steps           optimiser steps of each
    batch           rows of each candidate in a step; or (first step, rows) pairs
    eval_batch      rows of each candidate in a batch of evaluation
    evaluate_every  steps; None: at the end and at the rungs of halving
    halving         eta of successive halving (Jamieson & Talwalkar 2016): at steps·eta^-1, eta^-2, … the worse go, so that n,
                    n/eta, n/eta², … are left; 0: none
    finalists       no rung leaves fewer than these, and the best of them at the end wins: with 8 candidates, halving=2 and
                    2 finalists a race costs 3 runs of one, with 1 finalist 2.4, and the last choice is between two whole runs
    spare           what becomes of their rows: 'time' (the steps get cheaper) or 'rows' (the batch of those left grows by
                    n / survivors, by plan, also where some diverged before). `report.batches` says which, so that the same
                    candidate trained alone with batch=report.batches is the same
    together        False: one candidate after another's step, each alone in its batch, for comparison
    max_rows        most rows in one forward; more candidates than fit go in several
    graph           record a training step as a CUDA graph and replay it; all examples are padded to the longest then, and
                    candidates whose steps differ (AdaLoRA, AdapterDrop, a lottery ticket) share forwards of their own
    best            keep the weights of each candidate's best score, not those of its last step
    loss            (logits, labels) -> (sum, count); default by the labels' shape
    metric          (logits, labels) -> float on all held-out rows; default accuracy, or minus the mean loss
    tokenizer       for vn.PromptTuning(init='text')
    checkpoint      a folder: the race is saved there, whole or not at all, every `checkpoint_every` steps (default: at each
                    evaluation), and goes on from there if it holds the same race
    keep            'winner' (it stays attached and active), 'all' or 'none'
    on_step         called with the step and the records, to show progress

    A candidate whose loss or score is not finite is taken out (status 'diverged'); its rows touch no others'. Candidates with a
    method that cannot be routed run alone in the same race, and their record says so.

    Raises: ConfigError, DataError, PlanError, SiteError, AdapterError (a name is taken). After an error the model is as before.
    """
    chosen = _candidates(candidates)
    _check(steps, batch, eval_batch, evaluate_every, halving, finalists, spare, keep, max_rows, checkpoint_every)
    if not callable(evaluate):
        evaluate = Rows(evaluate, pad=_pad(model), device=next(model.parameters()).device, what="evaluate")
    rows = Rows(train, pad=_pad(model), device=next(model.parameters()).device, what="train")
    rungs = _rungs(len(chosen), steps, halving, finalists)
    batches = [(0, batch)] if isinstance(batch, int) else [(int(a), int(b)) for a, b in batch]
    if spare == "rows":
        batches = [*batches, *((s, batches[0][1] * len(chosen) // left) for s, left in rungs if s < steps)]
    settings = {"steps": steps, "batches": batches, "rungs": rungs, "seed": seed, "best": best, "examples": len(rows)}
    was_active = active(model) if "_veneer_state" in model.__dict__ else ()
    attached: list[str] = []
    order = Order(len(rows), batches, seed)
    shown = [inputs | {"labels": labels} for inputs, labels in map(rows.batch, map(order.rows, range(min(steps, SHOWN))))]
    try:
        lanes = []
        for name, c in chosen.items():
            with torch.random.fork_rng(devices=gpus(model)):
                torch.manual_seed(seed)  # each starts from the numbers that it would start from alone
                data = shown if any(m.needs_data for m in c.plan.leaves()) else None
                adapter = _named(name, lambda c=c, n=name, b=data: attach(model, c.plan, name=n, activate=False, tokenizer=tokenizer, batches=b))
            attached.append(name)
            record = Record(name, c.plan.to_dict(), {k: v for k, v in c.to_dict().items() if k != "plan"}, adapter.num_parameters)
            lanes.append(Lane(c, adapter, steps, record))
        own_loss = loss or loss_of(model)
        run = Heats(model, lanes, rows, evaluate, order, own_loss, Judge(own_loss, metric), eval_batch, together, max_rows, best, graph)
        run.go(settings, evaluate_every, dict(rungs), checkpoint, checkpoint_every, on_step)
        able = [x for x in lanes if x.record.best is not None and x.record.status in ("finished", "stopped")]
        first = max(able, key=lambda x: (x.record.best, -x.record.parameters), default=None)
        report = RaceReport({x.name: x.record for x in lanes}, first.name if first else None, steps, batches, rungs, run.seconds, seed, settings)
        for lane in lanes:
            lane.restore()
            lane.tensors.clear()
            if keep == "none" or (keep == "winner" and lane is not first):
                detach(model, lane.name)
                attached.remove(lane.name)
    except BaseException:
        for name in attached:
            detach(model, name)
        if was_active:
            activate(model, was_active)
        raise
    if keep != "none" and report.winner is not None:
        activate(model, report.winner)
    elif "_veneer_state" in model.__dict__:
        activate(model, was_active)
    return report


def _candidates(given: Any) -> dict[str, Candidate]:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"a race needs candidates, not {short(given)}", fix="Give {'lora': vn.LoRA(8), 'bitfit': vn.BitFit(), …}")
    out = {}
    for name, c in given.items():
        out[name] = c if isinstance(c, Candidate) else _named(name, lambda c=c: Candidate(c))
    return out


def _named(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; its refusals say which candidate they are about."""
    try:
        return make()
    except VeneerError as e:
        raise type(e)(e.what, where=f"candidate {name}{', ' + e.where if e.where else ''}", fix=e.fix) from None


def _check(
    steps: Any, batch: Any, eval_batch: Any, every: Any, halving: Any, finalists: Any, spare: Any, keep: Any, max_rows: Any, save_every: Any
) -> None:  # fmt: skip
    whole = {"steps": steps, "eval_batch": eval_batch, "finalists": finalists}
    whole |= {k: v for k, v in (("evaluate_every", every), ("max_rows", max_rows), ("checkpoint_every", save_every)) if v is not None}
    if isinstance(batch, int):
        whole["batch"] = batch
    elif not batch or batch[0][0] != 0 or [a for a, _ in batch] != sorted({a for a, _ in batch}) or any(b < 1 for _, b in batch):
        raise ConfigError(f"batch is {short(batch)}", fix="Give a number of rows, or (first step, rows) pairs that begin with step 0")
    for key, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key} is {short(value)}", fix="Give a whole number of at least 1")
    if not isinstance(halving, int) or halving < 0 or halving == 1:
        raise ConfigError(f"halving is {short(halving)}", fix="Give 2 or more: what share of the candidates goes on is 1/halving; 0 for none")
    if spare not in SPARE:
        raise ConfigError(f"spare is {short(spare)}", fix=did_you_mean(str(spare), SPARE))
    if keep not in KEEP:
        raise ConfigError(f"keep is {short(keep)}", fix=did_you_mean(str(keep), KEEP))
    if spare == "rows" and not isinstance(batch, int):
        raise ConfigError("spare='rows' plans the batch itself", fix="Give batch as a number, or spare='time'")


def _rungs(n: int, steps: int, eta: int, finalists: int = 1) -> list[tuple[int, int]]:
    """(step, survivors) of successive halving."""
    if not eta or n < 2:
        return []
    left, counts = n, []
    while left > 1:
        left = -(-left // eta)
        counts.append(left)
    out: dict[int, int] = {}
    for i, c in enumerate(counts):
        if max(c, finalists) < (min(out.values()) if out else n):
            out[max(1, round(steps * eta ** (i - len(counts))))] = max(c, finalists)
    return sorted(out.items())


def _pad(model: Any) -> int:
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0
