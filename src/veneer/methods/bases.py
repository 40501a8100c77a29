"""Bases that the maps of one kind share, in all layers: a higher-order generalised SVD of their matrices."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.maps import map_of
from ..ops.weights import weight_of
from ..sites import Site
from .base import Build
from .part import Bank, like, module_at

if TYPE_CHECKING:
    from .frod import FRoD


def kind(site: Site) -> str:
    """What the maps that share a basis have in common: where they are in their layer, and their inputs."""
    tail = re.split(r"(?:^|\.)\d+\.", site.path)[-1]
    return re.sub(r"\W", "_", f"{tail}_{site.role if site.slice is not None else ''}_{site.inp}")


class Bases(Bank):
    """Of every kind V_… (in, in), and index_… int32, the flat places of S."""

    def __init__(self, m: FRoD, chosen: list[Site], build: Build) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(m.seed)
        kinds: dict[str, list[Site]] = {}
        for site in chosen:
            kinds.setdefault(kind(site), []).append(site)
        for name, sites in sorted(kinds.items()):
            new, n = like(build, sites[0]), sites[0].inp
            index, v = torch.empty(m.entries(n), dtype=torch.int32, device=new["device"]), torch.empty(n, n, **new)
            if not build.blank:
                modules = [module_at(build.model, s.path) for s in sites]
                v = basis([weight_of(x, s, map_of(s, x)) for x, s in zip(modules, sites, strict=True)], m.ridge).to(v)
                off = torch.arange(n * n).reshape(n, n)[~torch.eye(n, dtype=torch.bool)]
                index = off[torch.randperm(len(off), generator=g)[: len(index)]].to(index)
            self.frozen(f"V_{name}", v)
            self.frozen(f"index_{name}", index)

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """Take those of kinds that vn.settle dropped, too."""
        for name, t in saved.items():
            if name not in self._buffers and name.isidentifier() and name.startswith(("V_", "index_")):
                self.frozen(name, torch.empty_like(t))

    def flaw(self) -> str:
        for name, t in self._buffers.items():
            if name.startswith("index_") and len(t) and not t.is_meta:  # type: ignore[arg-type,union-attr]
                n = len(self._buffers[name.replace("index", "V", 1)])  # type: ignore[arg-type]
                if int(t.min()) < 0 or int(t.max()) >= n * n:  # type: ignore[union-attr]
                    return f"{name} has places outside of {n} x {n}"
        return ""


def basis(ws: list[Tensor], ridge: float) -> Tensor:
    """V of matrices with the same columns. In fp32 on the CPU, as PEFT makes it: its files hold V, but not the U it was made with."""
    ws = [w.detach().float().cpu() for w in ws]
    tall = torch.cat(ws)
    if tall.shape[0] < tall.shape[1]:
        return torch.linalg.svd(tall, full_matrices=True)[2].T
    q, r = torch.linalg.qr(tall)
    one = torch.eye(r.shape[1])
    mean = torch.zeros_like(one)
    for piece in q.split([len(w) for w in ws]):
        mean += torch.linalg.inv(piece.T @ piece + ridge * one)
    return r.T @ torch.linalg.eigh(mean / len(ws))[1]


def left(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U and λ with w = U diag(λ) vᵀ, as near as v has it."""
    w64, v64 = w.detach().double(), v.detach().double().to(w.device)
    try:
        scaled = torch.linalg.solve(v64, w64.T).T
    except torch.linalg.LinAlgError:  # v has no inverse
        scaled = w64 @ torch.linalg.pinv(v64, rtol=1e-6).T
    length = scaled.norm(dim=0)
    return torch.where(length > 1e-12, scaled / length.clamp(min=1e-30), 0).float(), length.float()
