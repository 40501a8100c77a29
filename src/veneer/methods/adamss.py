"""AdaMSS: the rows of W fall into subspaces, and each gets a small low-rank change of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .matrices import wide
from .part import Part, like
from .subspaces import Contested, segmented, with_bias

POWER = 3  # of the falling curve: Hugging Face PEFT's


@dataclass(frozen=True)
class AdaMSS(Method):
    """Adaptive multi-subspace approach (Zheng et al., NeurIPS 2025, OpenReview 8ZdWmpYxT0).

        y = W x + b + P · blockdiag(B_1 A_1, …, B_K A_K) · V (x, 1),   A_i (k_i, r), B_i (n_i, k_i)

    of the SVD [W b] ≈ U S V of rank r: k-means puts the rows of U in K clusters of n_i rows, whose order P undoes. V is
    frozen. A map without a bias has no 1.

    at         any maps but expert tensors; default 'attn.{q,v}'
    r, subspaces, rank  r, K and k_i: 100, 5 and 1 by default, as in Hugging Face PEFT, and at most what a map has
    threshold  k_i leaves out squared singular values of the cluster's rows of U under this share of the largest; None
               (default) leaves out none
    seed       of the randomised SVD; 0 by default. k-means is PEFT's, so that its files fit
    target     how many subspaces, of all maps together, train on in the end; None (default): all. Between the shares `warmup`
               (0.05) and `final` (0.5) of a run the number falls along a cubic curve, every `every` (100) steps, and those
               of least importance stay as they are. It is |p · dL/dp|, smoothed, times its smoothed deviation

    A_i is the cluster's leading row space and B_i zero at the start. A V is made once a step, so no activation has r features.
    Veneer's trainers call vn.advance, which `target` needs. Parameters: Σ k_i (r + n_i) a map. Raises: PlanError;
    CapabilityError where the base's weight, or scikit-learn (to attach, and not to load), cannot be had.
    """

    name = "adamss"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "OpenReview 8ZdWmpYxT0"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    r: int = 100
    subspaces: int = 5
    rank: int = 1
    threshold: float | None = None
    seed: int = 0
    target: int | None = None
    warmup: float = 0.05
    final: float = 0.5
    every: int = 100
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r, subspaces=self.subspaces, rank=self.rank, every=self.every, **({} if self.target is None else {"target": self.target}))
        self._count(seed=self.seed)
        self._share(warmup=self.warmup, final=self.final, **({} if self.threshold is None else {"threshold": self.threshold}))
        self._pattern()
        if self.warmup >= self.final:
            raise self._fail(f"warmup={self.warmup} leaves no steps before final={self.final}", "warmup must be under final")

    def part(self, site: Site, build: Build) -> Part:
        return AdaMSSPart(site, build, self)

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        if self.target is None:
            return
        first, last = int(self.warmup * total), int(self.final * total)
        if first <= step <= last:
            for p in parts:
                p.measure()
            if step == last or step % self.every == 0:
                spare = max(0, sum(len(p.A) for p in parts) - self.target)
                self._keep(parts, int(self.target + spare * ((last - step) / max(1, last - first)) ** POWER))
        for p in parts:
            p.rest()

    def _keep(self, parts: list[Any], n: int) -> None:
        """Let the n most important of the subspaces that still train go on."""
        scores = sorted(((p.importance(i), -j, i) for j, p in enumerate(parts) for i in range(len(p.A)) if p.live[i]), reverse=True)
        for _, j, i in scores[n:]:
            parts[-j].live[i] = False
        for p in parts:
            p.contest()


class AdaMSSPart(Contested):
    """V (r, in or in + 1); rows (out): where each output lies in the clusters' order; live (K): which train on."""

    V: Tensor
    rows: Tensor

    def __init__(self, site: Site, build: Build, m: AdaMSS) -> None:
        super().__init__(site, build)
        new = self.__dict__["new"] = like(build, site)
        bias = None if self.map.read_by_others else self.bias()
        self.biased, self.limits = bias is not None, (m.subspaces, m.rank)
        if self.biased:
            self.factors = None  # type: ignore[assignment]  # there is more to it than these
        self.contest()
        if build.blank:
            width = site.inp + self.biased
            self.hold([(1, 1)], torch.empty(min(m.r, site.out, width), width, **new), torch.empty(site.out, **new))
            return
        u, v, clusters = segmented(with_bias(wide(self.weight()), bias), m.r, m.subspaces, m.seed)
        starts = []
        for rows in clusters:
            _, s, basis = torch.linalg.svd(u[rows], full_matrices=False)
            k = len(s) if m.threshold is None else int((s.square() > m.threshold * s[0].square()).sum())
            starts.append(basis[: max(1, min(k, m.rank))])
        self.hold([(len(a), len(rows)) for a, rows in zip(starts, clusters, strict=True)], v, torch.cat(clusters).argsort())
        with torch.no_grad():
            for p, a in zip(self.A, starts, strict=True):
                p.copy_(a)

    def hold(self, shapes: list[tuple[int, int]], v: Tensor, rows: Tensor) -> None:
        """Make room for subspaces of k_i directions and n_i outputs: zeros."""
        self.A = nn.ParameterList(torch.zeros(k, v.shape[0], **self.new) for k, _ in shapes)
        self.B = nn.ParameterList(torch.zeros(n, k, **self.new) for k, n in shapes)
        self.frozen("V", v.to(self.new["dtype"]).contiguous())
        self.frozen("rows", rows.int())
        self.frozen("live", torch.ones(len(shapes), dtype=torch.bool, device=self.new["device"]))

    def unfold(self, saved: dict[str, Any]) -> None:
        """Take the file's clusters: their sizes follow from the base's numbers, and not from the plan."""
        b = [t for i in range(self.limits[0]) if (t := saved.get(f"B.{i}")) is not None and t.dim() == 2]
        if b and sum(len(t) for t in b) == self.site.out and max(t.shape[1] for t in b) <= self.limits[1]:
            self.hold([(t.shape[1], len(t)) for t in b], self.V, self.rows)

    def flaw(self) -> str:
        good = self.rows.is_meta or torch.equal(self.rows.sort().values.cpu(), torch.arange(self.site.out, dtype=torch.int32))
        return "" if good else f"its rows are not the {self.site.out} of the matrix, each once"

    def pair(self) -> tuple[Tensor, Tensor]:
        """A V, with the column of the bias where there is one, and blockdiag(B) with its rows where they belong."""
        return torch.cat(list(self.A)) @ self.V, torch.block_diag(*self.B)[self.rows.long()]

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair()
        y = self.map.up(self.map.down(x, self.cast(a[:, : self.site.inp], h)), self.cast(b, h))
        return y + self.map.features(self.cast(b @ a[:, -1], h), h) if self.biased else y

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both = torch.mm(*reversed(self.pair())).to(w.dtype)
        return both[:, : self.site.inp], both[:, -1] if self.biased and b is not None else None

    def reads_weight(self) -> bool:
        return False

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            for p in self.B:
                p.mul_(c)
        return True
