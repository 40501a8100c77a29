"""What AdaMSS stands on: clusters of a matrix's rows, and which of a part's subspaces train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CapabilityError
from .lowrank import LowRankPart
from .matrices import svd

BETA = 0.85  # of both averages: Hugging Face PEFT's


def segmented(w: Tensor, r: int, k: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U (out, r) and V (r, in) of w, randomised with `seed`, and the row numbers of at most k clusters of U's rows.

    k-means starts and stops as Hugging Face PEFT's does, whose files hold no row numbers: other clusters would not be theirs.
    Raises: CapabilityError without scikit-learn.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise CapabilityError("clusters of rows come from scikit-learn, which is not installed", fix='pip install "veneer[clusters]"') from e
    u, _, v = svd(w, min(r, *w.shape), 2, seed)
    means = KMeans(min(k, len(u)), init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit_predict(u.float().cpu().numpy())).to(w.device)
    return u, v, [torch.where(labels == i)[0] for i in range(int(labels.max()) + 1)]


def with_bias(w: Tensor, b: Tensor | None) -> Tensor:
    """[W b]."""
    return w if b is None else torch.cat([w, b.to(w).unsqueeze(1)], 1)


class Contested(LowRankPart):
    """A part of subspaces A_i, B_i, of which those that are not `live` stay as they are."""

    A: Any
    B: Any
    live: Tensor
    held: dict[Any, Tensor] | None
    new: dict[str, Any]

    def contest(self) -> None:
        """Begin to measure anew."""
        self.__dict__["seen"], self.__dict__["held"] = {}, None

    @torch.no_grad()
    def measure(self) -> None:
        """Note |p · dL/dp| of this step."""
        for p in (*self.A, *self.B):
            if p.grad is not None:
                now = (p * p.grad).abs()
                mean, spread = self.seen.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                self.seen[p] = BETA * mean + (1 - BETA) * now, BETA * spread + (1 - BETA) * (now - mean).abs()

    def importance(self, i: int) -> float:
        return sum(float((mean * spread).mean()) for p in (self.A[i], self.B[i]) if p in self.seen for mean, spread in [self.seen[p]])

    @torch.no_grad()
    def rest(self) -> None:
        """Undo what the step, with its momentum, did to subspaces that train no more."""
        if self.held is None:
            self.__dict__["held"] = {p: p.clone() for i, live in enumerate(self.live.tolist()) if not live for p in (self.A[i], self.B[i])}
        for p, value in self.held.items():
            p.copy_(value)
