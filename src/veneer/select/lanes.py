"""One candidate in a race: its optimiser, learning rate, clipping, stop and record. Nothing here knows of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import ConfigError, did_you_mean
from ..plan import Plan, finite, short
from ..train.rates import rate_of
from ..training import advance, param_groups

SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


@dataclass(frozen=True)
class Candidate:
    """A plan and how it is trained.

    lr            of AdamW; None: by method, as `veneer train` (lora, bottleneck 5e-4; prefix 5e-3; (IA)3 3e-3; …)
    weight_decay  of AdamW; 0
    warmup        share of the steps over which lr rises linearly from 0; 0.06, as RoBERTa and LoRA on GLUE
    schedule      what follows: 'linear' (to 0), 'cosine' (to 0) or 'constant'
    clip          largest norm of this candidate's own gradient; 1.0; None: no clipping
    patience      stop after so many evaluations without a better score; None: never
    betas, eps    of AdamW; torch's

    Raises: ConfigError for an unknown schedule or a number out of range.
    """

    plan: Plan
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: str = "linear"
    clip: float | None = 1.0
    patience: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", Plan.from_dict(self.plan))
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {short(self.schedule)}", fix=did_you_mean(str(self.schedule), SCHEDULES))
        for key, low in (("lr", True), ("clip", True), ("weight_decay", False), ("warmup", False)):
            value = getattr(self, key)
            if value is not None and (not finite(value) or value < 0 or (low and value == 0)):
                raise ConfigError(f"{key} is {short(value)}", fix="Give a positive number" if low else "Give 0 or a positive number")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise ConfigError(f"patience is {short(self.patience)}", fix="Give a whole number of evaluations, at least 1")

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else rate_of(self.plan)

    def rate_at(self, step: int, steps: int) -> float:
        """lr at `step` (from 0) of `steps`."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * SCHEDULES[self.schedule]((step - warm) / max(1, steps - warm))

    def to_dict(self) -> dict[str, Any]:
        out = {k: v for k, v in asdict(self).items() if k != "plan"}
        return {"plan": self.plan.to_dict(), **out, "lr": self.rate, "betas": list(self.betas)}


@dataclass
class Record:
    """What is known of a candidate: plain data.

    status   'running'; 'finished' (all steps); 'stopped' (its own patience); 'dropped' (halving); 'diverged' (loss, gradient
             or score not finite)
    step     optimiser steps taken          examples  rows trained on
    losses   [step, training loss] pairs    scores    [step, score] pairs
    best     the best score, at `best_step`, whose weights are kept
    seconds  its share of the race's time, by rows
    note     why it ended, or how it was run
    """

    name: str
    plan: dict[str, Any]
    settings: dict[str, Any]
    parameters: int
    status: str = "running"
    step: int = 0
    examples: int = 0
    losses: list[list[float]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    note: str = ""
    together: bool = True


class Lane:
    """A candidate while it runs."""

    def __init__(self, candidate: Candidate, adapter: Adapter, steps: int, record: Record) -> None:
        self.candidate, self.adapter, self.steps, self.record = candidate, adapter, steps, record
        self.tensors = dict(adapter.named_parameters())
        groups = param_groups(adapter.model, 1.0, candidate.weight_decay, names=(adapter.name,))
        for group in groups:
            group["rate"] = group["lr"]  # as a multiple of the candidate's own
        self.params = [p for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cuda", "cpu", "xpu") for p in self.params)
        self.optimizer = torch.optim.AdamW(groups, betas=candidate.betas, eps=candidate.eps, fused=fused)
        self.kept: dict[str, Tensor] = {}
        self.since = 0
        self.pending: list[tuple[int, Tensor]] = []  # losses that still lie on the device

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def running(self) -> bool:
        return self.record.status == "running"

    @property
    def steady(self) -> bool:
        """Whether each of its steps does the same operations."""
        return all(m.steady for m in self.candidate.plan.leaves())

    def rates(self, step: int) -> list[float]:
        """The learning rate of each parameter group at `step`."""
        now = self.candidate.rate_at(step, self.steps)
        return [group["rate"] * now for group in self.optimizer.param_groups]

    def update(self, rates: Sequence[float | Tensor]) -> None:
        """Clip the gradients that lie in the parameters, and let the optimiser take its step."""
        if self.candidate.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.candidate.clip)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()

    def step(self, loss: Tensor, rows: int) -> None:
        """One optimiser step from the gradients that lie in the parameters."""
        self.update(self.rates(self.record.step))
        advance(self.adapter.model, self.record.step + 1, self.steps, self.optimizer, names=(self.name,))
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]  # a method may have exchanged some
        self.optimizer.zero_grad(set_to_none=True)
        self.note(loss.detach(), rows)

    def note(self, loss: Tensor, rows: int) -> None:
        """Count a step that was taken."""
        self.record.step += 1
        self.record.examples += rows
        self.pending.append((self.record.step, loss))

    def settle(self) -> None:
        """Fetch the losses since the last time; a candidate whose loss is not finite has diverged."""
        if not self.pending:
            return
        values = torch.stack([v.float() for _, v in self.pending]).tolist()
        for (step, _), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                self.diverge(f"its training loss at step {step} is {value}")
                break
            self.record.losses.append([step, value])
        self.pending.clear()

    def diverge(self, note: str) -> None:
        self.end("diverged", note)
        self.optimizer.zero_grad(set_to_none=True)

    def end(self, status: str, note: str = "") -> None:
        self.record.status = status
        self.record.note = "; ".join(n for n in (self.record.note, note) if n)

    def scored(self, score: float, best: bool) -> None:
        """Note a score; keep the weights of the best one."""
        r = self.record
        if not math.isfinite(score):
            self.diverge(f"its score at step {r.step} is {score}")
            return
        r.scores.append([r.step, score])
        if r.best is None or score > r.best:
            r.best, r.best_step, self.since = score, r.step, 0
            if best:
                self.kept = {k: v.detach().clone() for k, v in self.tensors.items()}
            return
        self.since += 1
        if self.candidate.patience is not None and self.since >= self.candidate.patience:
            self.end("stopped", f"no better score in {self.since} evaluations")

    def restore(self) -> None:
        """Put the weights of the best score back."""
        with torch.no_grad():
            for k, v in self.kept.items():
                self.tensors[k].copy_(v)

    # -- files ----------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed lane needs, as tensors."""
        out = {f"now/{k}": v.detach() for k, v in self.tensors.items()}
        out |= {f"best/{k}": v for k, v in self.kept.items()}
        for i, p in enumerate(self.params):
            for k, v in self.optimizer.state.get(p, {}).items():
                out[f"optimizer/{i}/{k}"] = v
        return out

    def load(self, tensors: dict[str, Tensor], since: int) -> None:
        self.since = since
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, rest = key.partition("/")
                if kind == "now":
                    self.tensors[rest].copy_(value)
                elif kind == "best":
                    self.kept[rest] = value.to(self.tensors[rest].device)
                elif kind == "optimizer":
                    i, _, k = rest.partition("/")
                    moments.setdefault(int(i), {})[k] = value
        described = self.optimizer.state_dict()
        described["state"] = moments
        self.optimizer.load_state_dict(described)
