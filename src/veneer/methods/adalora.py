"""AdaLoRA: LoRA as an SVD, whose ranks are a budget that is dealt out while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..fingerprint import gathered
from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, check_rank, lead
from .part import Part, like


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Adaptive budget allocation (Zhang et al., ICLR 2023, arXiv 2303.10512).

        y = W x + b + s · B diag(E) A x,   s = alpha / r,   A (r, in), E (r), B (out, r)

    After each optimiser step the triplets (B_:i, E_i, A_i:) of all maps compete: those of least importance lose their
    E_i, down to a budget of triplets that falls from r to `target` a map along a cubic curve. Importance is |p · dL/dp|,
    smoothed, times its smoothed deviation; a triplet's is its E's, and the means over its row of A and its column of B.

    at        any maps; default 'attn.{q,v}'
    r         the rank to start from; 12 by default, as the paper's 1.5 times the target
    target    the mean rank in the end; 8 by default
    alpha     numerator of the scale; r by default, so s = 1
    dropout   on x before A, while training; 0 by default
    warmup, final  the shares of the run before the budget falls, and after it has: there the ranks are fixed. 0.1 and
              0.5 by default, about the paper's MNLI (8,000 and 50,000 of 85,900 steps)
    every     steps between two allocations; 1 by default, as in Hugging Face PEFT (the paper's: 10 to 200)
    beta1, beta2   of the two averages; 0.85 by default (the paper's)
    orthogonal     weight of the penalty, the mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖; 0.5 by default (PEFT's;
              the paper: 0.1 to 0.5). Add vn.penalty(model) to your loss, and call vn.advance(model, step, total) after
              each step: Veneer's own training does both.

    E is zero at the start; A and B ~ N(0, 0.02²). Which triplets are kept is saved (`kept`). Parameters: r (in + out + 1)
    a map. Raises: PlanError for a rank above the matrix's, or a target above r.
    """

    name = "adalora"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2303.10512"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 12
    target: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.5
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, target=self.target, every=self.every)
        self._share(dropout=self.dropout, warmup=self.warmup, final=self.final, beta1=self.beta1, beta2=self.beta2)
        self._finite(orthogonal=self.orthogonal, **({} if self.alpha is None else {"alpha": self.alpha}))
        self._pattern()
        if self.target > self.r:
            raise self._fail(f"target={self.target} is over r={self.r}, which the budget falls from", f"Use r={self.target} or more")
        if self.warmup + self.final >= 1:
            raise self._fail(f"warmup={self.warmup} and final={self.final} leave no steps between them", "Their sum must be under 1")

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        made = list(super().parts(sites, build))
        for site, part in made:
            part.weight_of_penalty = self.orthogonal / (2 * len(made))
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        return AdaLoRAPart(site, build, self)

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        first, last = int(self.warmup * total), total - int(self.final * total)
        if step <= last:
            for p in parts:
                p.measure(self.beta1, self.beta2)
        if step == last or (first < step < last and step % self.every == 0):
            self._allocate(parts, self.budget(len(parts), step, first, last, sum(p.E.numel() for p in parts)))
        with torch.no_grad():
            for p in parts:
                if step >= last:
                    p.prune()

    def budget(self, maps: int, step: int, first: int, last: int, whole: int) -> int:
        """How many triplets remain after `step`; `whole` at the start."""
        least = whole * self.target // self.r
        rest = max(0.0, 1 - (step - first) / max(1, last - first))
        return int((whole - least) * rest**3 + least)

    def _allocate(self, parts: list[Part], budget: int) -> None:
        """Keep the `budget` most important triplets; the others' E becomes zero."""
        scores = torch.cat([p.importance().flatten().to(parts[0].E.device) for p in parts])
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.topk(budget).indices] = True
        with torch.no_grad():
            for p, mine in zip(parts, keep.split([p.E.numel() for p in parts]), strict=True):
                p.kept.copy_(mine.reshape(p.E.shape))
                p.prune()


class AdaLoRAPart(LowRankPart):
    kept: Tensor
    weight_of_penalty = 0.0

    def __init__(self, site: Site, build: Build, m: AdaLoRA) -> None:
        super().__init__(site, build)
        check_rank("AdaLoRA", m.r, site)
        new = like(build, site)
        self.A = nn.Parameter(torch.empty(*lead(site), m.r, site.inp, **new).normal_(std=0.02))
        self.B = nn.Parameter(torch.empty(*lead(site), site.out, m.r, **new).normal_(std=0.02))
        self.E = nn.Parameter(torch.zeros(*lead(site), m.r, **new))
        self.frozen("kept", torch.ones_like(self.E, dtype=torch.bool))
        self.scale = 1.0 if m.alpha is None else m.alpha / m.r
        self.dropout = m.dropout
        self.__dict__["seen"] = {}  # the averages: of this run alone

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A * self.E.unsqueeze(-1), self.B

    def penalty(self) -> Tensor:
        eye = torch.eye(self.A.shape[-2], device=self.A.device, dtype=self.A.dtype)
        both = [torch.linalg.matrix_norm(c - eye).mean() for c in (self.A @ self.A.mT, self.B.mT @ self.B)]
        return self.weight_of_penalty * (both[0] + both[1])

    @torch.no_grad()
    def measure(self, beta1: float, beta2: float) -> None:
        """Note |p · dL/dp| of this step."""
        for name, p in (("A", self.A), ("B", self.B), ("E", self.E)):
            if p.grad is None:  # a map that no token reached
                continue
            now = gathered((p * p.grad).abs())  # under FSDP2 every process has the whole, and so prunes the same
            mean, spread = self.seen.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = beta1 * mean + (1 - beta1) * now
            self.seen[name] = mean, beta2 * spread + (1 - beta2) * (now - mean).abs()

    def prune(self) -> None:
        """Zero the E that are not kept; under FSDP2 each process its own shard's."""
        mask = self.kept.to(self.E.dtype)
        if hasattr(self.E, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            mask = distribute_tensor(mask, self.E.device_mesh, self.E.placements)
        self.E.mul_(mask)

    def importance(self) -> Tensor:
        """Of each triplet, (r) or (E, r)."""
        a, b, e = (self.seen[n][0] * self.seen[n][1] if n in self.seen else self.kept.new_zeros(getattr(self, n).shape, dtype=torch.float32) for n in "ABE")
        return e + a.mean(-1) + b.mean(-2)

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "E")
