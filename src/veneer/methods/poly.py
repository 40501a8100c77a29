"""Polytropon: a LoRA for each task, mixed from skills that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, check_rank, kaiming
from .part import Part, like


@dataclass(frozen=True)
class Poly(Method):
    """Polytropon (Ponti et al., EACL 2023, arXiv 2202.13914); with several splits multi-head routing (Caccia et al., NeurIPS
    2023, arXiv 2211.03831).

        y = W x + b + s · B A x,   A = Σ_k w_k A_k,   B = Σ_k w_k B_k,   w = σ(z) / Σ_k σ(z_k),   s = alpha / r

    with z the task's own logits over the skills A_k (r, in), B_k (out, r); with splits, in and out are cut in as many pieces,
    each with a w of its own. While training σ(z) is replaced, once a call, by a draw from the relaxed Bernoulli distribution
    of temperature 1, sigmoid(z + log u - log(1 - u)), u ~ U(0, 1) (Hugging Face PEFT draws for every example).

    Every task is an adapter. Attach the first, and the others with `shared` naming it: they train the same skills, and a batch
    mixes tasks under vn.route. (A gate that is settled stays beside them as a constant.)

        vn.attach(model, vn.Poly(4), name="nli")
        vn.attach(model, vn.Poly(4, shared="nli"), name="qa", activate=False)

    at      any maps but experts; default 'attn.{q,v}'
    r       8 by default, as in PEFT
    skills  4 by default (PEFT's; the paper: 8)
    splits  1 by default; divides in and out
    alpha   1 by default, so s = 1 / r (PEFT's). Under a gate s = 1
    shared  an attached adapter whose skills this one trains too

    B is zero at the start, and z ~ U(-0.001, 0.001). Saved is the task whole, skills with it. Parameters: skills r (in + out) +
    skills · splits a map, of which skills · splits for every further task. Raises: PlanError.
    """

    name = "poly"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2202.13914, 2211.03831"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    r: int = 8
    skills: int = 4
    splits: int = 1
    alpha: float = 1.0
    shared: str | None = None
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, skills=self.skills, splits=self.splits)
        self._finite(alpha=self.alpha)
        if self.shared is not None and (not isinstance(self.shared, str) or not self.shared.strip()):
            raise self._fail(f"shared is the name of an attached adapter, not {self.shared!r}")
        self._pattern()

    def ungated(self) -> Method:
        return replace(self, alpha=self.r)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        for site, part in super().parts(sites, build):
            if self.shared is not None and not build.blank:
                other = self._task(build.model, part)
                part.A, part.B = other.A, other.B
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        check_rank("Poly", self.r, site)
        if site.inp % self.splits or site.out % self.splits:
            raise self._fail(f"splits={self.splits} does not divide the {site.out} x {site.inp} matrix of {site.path}", "Use splits=1")
        return PolyPart(site, build, self)

    def _task(self, model: Any, part: Part) -> PolyPart:
        from ..adapter import Adapter

        if model.__dict__.get("_veneer_state") is None:
            raise self._fail(f"no adapter called {self.shared!r} is attached", "Attach or load it first")
        for other in Adapter(model, self.shared).parts:
            if isinstance(other, PolyPart) and other.site == part.site:
                if other.A.shape != part.A.shape:
                    raise self._fail(f"{self.shared!r} has other sizes at {part.site.path!r}", "Give the same r, skills and splits")
                return other
        raise self._fail(f"{self.shared!r} has no skills at {part.site.path!r}", "Give the same `at`")


class PolyPart(LowRankPart):
    """A (splits, skills, r, in / splits), B (splits, skills, out / splits, r), z (splits, skills)."""

    def __init__(self, site: Site, build: Build, m: Poly) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.A = nn.Parameter(kaiming(torch.empty(m.splits, m.skills, m.r, site.inp // m.splits, **new), site.inp // m.splits))
        self.B = nn.Parameter(torch.zeros(m.splits, m.skills, site.out // m.splits, m.r, **new))
        self.z = nn.Parameter((torch.rand(m.splits, m.skills, **new) - 0.5) * 2e-3)
        self.scale = 1.0 if build.gated else m.alpha / m.r

    def mixed(self, drawn: bool) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the task."""
        z = self.z
        if drawn:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + u.log() - (1 - u).log()
        w = torch.sigmoid(z)
        w = w / (w.sum(-1, keepdim=True) + 1e-12)
        return torch.einsum("qs,qsri->rqi", w, self.A).flatten(1), torch.einsum("qs,qsor->qor", w, self.B).flatten(0, 1)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.mixed(self.training)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = self.mixed(False)
        return self.scale * (up.to(w.dtype) @ down.to(w.dtype)), None
