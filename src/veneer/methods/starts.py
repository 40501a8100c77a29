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
from torch import nn

from ..errors import PlanError
from .data_starts import corda, eva, lora_ga
from .matrices import svd, wide

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


STARTS = {
    "kaiming": Start(kaiming),
    "gaussian": Start(gaussian),
    "orthogonal": Start(orthogonal),
    "pissa": Start(pissa, shifted=True),
    "olora": Start(olora, shifted=True),
    "mica": Start(mica, frozen=("B",)),
    "eva": Start(eva, data=True, ranks=True),
    "corda": Start(corda, shifted=True, data=True),
    "corda-kpm": Start(corda, shifted=True, data=True),
    "lora-ga": Start(lora_ga, shifted=True, data=True),
}
