"""Multitask prompt tuning: one prompt for many tasks, and a low-rank matrix of factors for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import EmbedPart


@dataclass(frozen=True)
class MultitaskPrompt(Method):
    """Multitask prompt tuning (MPT; Wang et al., ICLR 2023, arXiv 2303.02861).

        input = [P_k; E(x)],   P_k = P ⊙ (u_k v_kᵀ),   P (n, d) shared by the tasks, u_k (n, r) and v_k (d, r) of task k

    Every task is an adapter. Source training: attach the first, and the others with `shared` naming it: they train the same
    P, and a batch mixes tasks under vn.route. A target task starts from trained ones with `source`.

        vn.attach(model, vn.MultitaskPrompt(100), name="nli")
        vn.attach(model, vn.MultitaskPrompt(100, shared="nli"), name="qa", activate=False)
        vn.attach(model, vn.MultitaskPrompt(100, source="nli,qa"), name="target")

    length   n; 10 by default (the paper: 100)
    rank     r; 1 by default (the paper's)
    shared   an attached adapter whose P this one trains too
    source   attached adapters (a comma list) to start from: a copy of the first one's P and the mean of their u and of their v
    before_cls, at   as in vn.PromptTuning

    Saved is the task whole, P with it, and loaded it stands alone. P starts from N(0, 0.02²), u from 1 and v from 1/r (so that
    P_k = P; the paper starts them at random). Not the identity at the start. Parameters: n d + r (n + d), of which r (n + d)
    for every further task. The paper's distillation from prompts of single tasks is not done here.
    Raises: PlanError, SiteError.
    """

    name = "multitask-prompt"
    family = "soft prompt"
    ports = ("embed",)
    paper = "arXiv 2303.02861"
    identity_at_init = False
    default_at = "embed"
    rate = (1e-2, "as prompt tuning here; the paper takes 0.3 (Wang et al. 2023)")

    length: int = 10
    rank: int = 1
    shared: str | None = None
    source: str | None = None
    before_cls: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(length=self.length, rank=self.rank)
        for key in ("shared", "source"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise self._fail(f"{key} is the name of an attached adapter, not {value!r}")
        self._bool(before_cls=self.before_cls)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        found = sites(self.at, "embed", self.default_at)
        for site in found if self.at is not None else found[:1]:
            part = MultitaskPart(site, build, self)
            if not build.blank:
                self._begin(part, build.model)
            yield site, part

    def _begin(self, part: MultitaskPart, model: Any) -> None:
        """Take over what `shared` and `source` name."""
        if self.source is not None:
            tasks = [self._task(model, name.strip(), part) for name in self.source.split(",")]
            with torch.no_grad():
                part.P.copy_(tasks[0].P)
                part.u.copy_(torch.stack([t.u for t in tasks]).mean(0))
                part.v.copy_(torch.stack([t.v for t in tasks]).mean(0))
        if self.shared is not None:
            part.P = self._task(model, self.shared, part).P

    def _task(self, model: Any, name: str, part: MultitaskPart) -> MultitaskPart:
        from ..adapter import Adapter

        attached = model.__dict__.get("_veneer_state")
        if attached is None:
            raise self._fail(f"no adapter called {name!r} is attached", "Attach or load it first")
        for other in Adapter(model, name).parts:
            if isinstance(other, MultitaskPart) and other.site == part.site:
                if other.u.shape != part.u.shape:
                    raise self._fail(f"{name!r} has length {other.u.shape[0]} and rank {other.u.shape[1]}", "Give the same length and rank")
                return other
        raise self._fail(f"{name!r} has no multitask prompt at {part.site.path!r}")


class MultitaskPart(EmbedPart):
    def __init__(self, site: Site, build: Build, m: MultitaskPrompt) -> None:
        super().__init__(site)
        new = like(build, site)
        self.P = nn.Parameter(torch.empty(m.length, site.width, **new).normal_(std=0.02))
        self.u = nn.Parameter(torch.ones(m.length, m.rank, **new))
        self.v = nn.Parameter(torch.full((site.width, m.rank), 1 / m.rank, **new))
        self.keep = 0 if m.before_cls else site.keep

    def prompt(self) -> Tensor:
        return self.P * (self.u @ self.v.t())
