"""Starts: the numbers that LoRA's A and B begin with.

A start that is not zero (B A ≠ 0) is written as a deviation, s (B A - B0 A0) with the frozen B0 A0 of the start, where
its paper changes the base to W - s B0 A0: the function, its gradients and its training are the same, and the base stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PlanError

if TYPE_CHECKING:
    from .base import Build
    from .factors import LoRAPart
    from .lora import LoRA


@dataclass(frozen=True)
class Start:
    """fill(parts, m, build) puts the numbers in. `shifted`: with a frozen B0 A0. `frozen`: tensors that are never
    trained. `data`: it looks at batches. `ranks`: it deals the ranks out anew."""

    fill: Callable[[list[LoRAPart], LoRA, Build], None]
    shifted: bool = False
    frozen: tuple[str, ...] = ()
    data: bool = False
    ranks: bool = False


def kaiming(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    for p in parts:
        nn.init.uniform_(p.A, -1 / math.sqrt(p.site.inp), 1 / math.sqrt(p.site.inp))


def gaussian(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    for p in parts:
        nn.init.normal_(p.A, std=1 / p.A.shape[-2])


def orthogonal(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """A = Q_oddᵀ-mixed, B = Q_even-mixed Gaussians / 10: neither is zero, and B A is, since Q's rows are orthogonal."""
    for p in parts:
        r = p.A.shape[-2]
        if r % 2:
            raise PlanError(f"LoRA: init='orthogonal' halves the rank, and {r} is odd", where=p.site.path, fix=f"Use r={r + 1}")
        new: dict[str, Any] = {"device": p.A.device, "dtype": p.A.dtype}
        lead = p.A.shape[:-2]
        q, _ = torch.linalg.qr(torch.randn(*lead, r, r, **new))
        a = q[..., 0::2, :].mT @ torch.randn(*lead, r // 2, p.site.inp, **new)
        b = torch.randn(*lead, p.site.out, r // 2, **new) @ q[..., 1::2, :]
        p.begin(a / 10, b / 10)


def svd(w: Tensor, k: int, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k) and V (k, in) of w: exact, or by `niter` iterations of the randomised method (Halko et al.)."""
    if niter is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, q=k, niter=niter)
        v = v.mT
    return u[..., :k], s[..., :k], v[..., :k, :]


def wide(w: Tensor) -> Tensor:
    """In fp32 at least: decompositions need it."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def pissa(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """B A = the r leading singular triplets of W, over s, their values shared evenly."""
    for p in parts:
        u, s, v = svd(wide(p.weight()), p.A.shape[-2], m.niter)
        root = (s / p.scale).sqrt()
        p.begin(root.unsqueeze(-1) * v, u * root.unsqueeze(-2))


def olora(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """B, A = the first r columns of Q and rows of R, of W = Q R."""
    for p in parts:
        q, r = torch.linalg.qr(wide(p.weight()))
        n = p.A.shape[-2]
        p.begin(r[..., :n, :], q[..., :n])


def mica(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """B = the left singular vectors of W's r smallest singular values, frozen; A = 0 is trained."""
    for p in parts:
        u, _, _ = torch.linalg.svd(wide(p.weight()), full_matrices=False)
        p.begin(torch.zeros_like(p.A), u[..., -p.A.shape[-2] :])


def eva(parts: list[LoRAPart], m: LoRA, build: Build) -> None:
    """A = the leading right singular vectors of the map's inputs; the ranks go where these explain most."""
    for p in parts:
        if p.site.kind not in ("linear", "transposed"):
            raise PlanError(f"LoRA: init='eva' looks at input vectors, and {p.site.kind} maps have none", where=p.site.path, fix="Leave it out of `at`")
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


STARTS = {
    "kaiming": Start(kaiming),
    "gaussian": Start(gaussian),
    "orthogonal": Start(orthogonal),
    "pissa": Start(pissa, shifted=True),
    "olora": Start(olora, shifted=True),
    "mica": Start(mica, frozen=("B",)),
    "eva": Start(eva, data=True, ranks=True),
    "lora-ga": Start(lora_ga, shifted=True, data=True),
}
