"""Starts of LoRA's A and B that are measured: what the batches given to vn.attach show of a map's inputs and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import PlanError
from .matrices import svd, wide

if TYPE_CHECKING:
    from .base import Build
    from .factors import LoRAPart
    from .lora import LoRA


def have_vectors(parts: list[LoRAPart], init: str) -> None:
    for p in parts:
        if p.site.kind not in ("linear", "transposed"):
            raise PlanError(f"LoRA: init={init!r} looks at input vectors, and {p.site.kind} maps have none", where=p.site.path, fix="Leave it out of `at`")


def eva(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """A = the leading right singular vectors of the map's inputs; the ranks go where these explain most."""
    have_vectors(parts, "eva")
    ranks = [p.A.shape[-2] for p in parts]
    most = [min(round(r * m.rho), p.site.inp, p.site.out) for r, p in zip(ranks, parts, strict=True)]
    seen = build.data("LoRA(init='eva')").directions([p.site for p in parts], max(most))
    room = [min(n, len(v)) for n, (v, _) in zip(most, seen, strict=True)]
    shares = [(float(share[j]), i) for i, (_, share) in enumerate(seen) for j in range(1, room[i])]
    dealt = [1] * len(parts)  # one each, so that all of them can learn; the rest by explained variance
    for _, i in sorted(shares, reverse=True)[: sum(ranks) - len(parts)]:
        dealt[i] += 1
    for p, (v, _), n in zip(parts, seen, dealt, strict=True):
        p.hold(n)
        p.begin(v[:n], torch.zeros_like(p.B))


def lora_ga(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """The first step is along full fine-tuning's: A = γ V[:r], B = γ U[r:2r] of the loss's gradient by W."""
    grads = build.data("LoRA(init='lora-ga')").gradients([p.site for p in parts])
    for p, g in zip(parts, grads, strict=True):
        r = p.A.shape[-2]
        if 2 * r > min(p.site.out, p.site.inp):
            raise PlanError(
                f"LoRA: init='lora-ga' takes 2 r = {2 * r} directions of the gradient, which has rank {min(p.site.out, p.site.inp)}",
                where=p.site.path,
                fix=f"Use r={min(p.site.out, p.site.inp) // 2} or less",
            )
        u, _, v = svd(p.map.canonical(g), 2 * r, m.niter)
        gamma = p.site.out**0.25 / 4  # (d_out)^(1/4) / sqrt(16): the paper's γ = 16
        p.begin(gamma * v[..., :r, :], gamma * u[..., r:])


DAMP = 0.01  # of the mean square of an input, added to every one: the paper's


def corda(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """B A = r singular triplets of W C, times C⁻¹, over s, C = mean x xᵀ of the inputs: those in which W acts on them most
    ('corda', the paper's instruction-previewed mode), or least ('corda-kpm', knowledge-preserved)."""
    have_vectors(parts, m.init)
    for p, c in zip(parts, build.data(f"LoRA(init={m.init!r})").moments([p.site for p in parts]), strict=True):
        r, w = p.A.shape[-2], wide(p.weight())
        c = c.to(w)
        c.diagonal().add_(DAMP * c.diagonal().mean())
        first = m.init == "corda"
        u, s, v = svd(w @ c, r if first else min(w.shape), m.niter if first else None)
        root = (s[-r:] / p.scale).sqrt()
        p.begin(root[:, None] * torch.linalg.solve(c, v[-r:].t()).t(), u[:, -r:] * root)
