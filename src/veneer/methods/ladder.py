"""Ladder side tuning: a small network beside the base, into which no gradient goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import OutputPart


@dataclass(frozen=True)
class Ladder(Method):
    """Ladder side tuning (Sung et al., NeurIPS 2022, arXiv 2206.06522; side tuning: Zhang et al. 2020, arXiv 1912.13503).

        s₀ = D₀ h₀,   s_l = block_l(μ_l s_{l-1} + (1 - μ_l) D_l h_l),   h_L' = h_L + U s_L
        block(s) = s + W₂ gelu(W₁ norm(s)),   μ_l = sigmoid(a_l / 0.1),   D_l (k, d), U (d, k)

    h_l is the residual stream after layer l, taken without its gradient: the backward pass runs through the side network and
    what stands above the last layer, and the base keeps no activations for it.

    reduction  d / k; 8 by default (the paper's)
    at         'layer' (default): the layers that are read, of the last tower (an encoder-decoder's decoder); the side network's
               answer is added where the last of them ends

    The paper's blocks are transformer layers of width k, cut from the base; these are feed-forward blocks, the same in every
    architecture, and leave mixing the tokens to the base. a = 0 at the start (μ = 1/2, the paper's), U = 0, so h' = h.
    Parameters: (L + 1)(d k) + L (8 k² + 7 k + 1) + d k. Rows of a batch cannot use different ladders. Raises: PlanError.
    """

    name = "ladder"
    family = "additive"
    ports = ("hidden",)
    paper = "arXiv 2206.06522, 1912.13503"
    routable = False
    default_at = "layer"

    reduction: float = 8.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._finite(reduction=self.reduction)
        if self.reduction <= 0:
            raise self._fail(f"reduction must be positive, not {self.reduction!r}")
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        towers: dict[str, list[Site]] = {}
        for site in sites(self.at, "hidden", self.default_at):
            towers.setdefault(site.tower, []).append(site)
        for members in towers.values() if self.at is not None else list(towers.values())[-1:]:
            if len({s.width for s in members}) > 1:
                raise self._fail(f"the width varies from layer to layer in the tower {members[0].tower!r}", "Choose layers of one width: at='layer@2:'")
            yield members[-1], LadderPart(members, build, self)


class Block(nn.Module):
    def __init__(self, k: int, new: dict) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(k, **new)
        self.up, self.down = nn.Linear(k, 4 * k, **new), nn.Linear(4 * k, k, **new)


class LadderPart(OutputPart):
    reads_state = True

    def __init__(self, sites: list[Site], build: Build, m: Ladder) -> None:
        site = sites[-1]
        super().__init__(site)
        new, d = like(build, site), site.width
        k = max(1, round(d / m.reduction))
        self.taps = tuple(s.enter for s in sites[:-1])
        self.D = nn.Parameter(torch.empty(len(sites) + 1, k, d, **new).normal_(std=d**-0.5))
        self.a = nn.Parameter(torch.zeros(len(sites), **new))
        self.blocks = nn.ModuleList(Block(k, new) for _ in sites)
        self.U = nn.Parameter(torch.zeros(d, k, **new))
        self.__dict__["layer"] = module_at(build.model, site.path)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        states = [*(tap.x for tap in self.seen), x.detach(), h.detach()]
        channels_second = h.shape[-1] != self.D.shape[-1]  # images as (B, C, *space)
        states = [t.movedim(1, -1) for t in states] if channels_second else states
        mu = torch.sigmoid(self.a / 0.1)
        s = nn.functional.linear(states[0], self.cast(self.D[0], h))
        for i, (block, t) in enumerate(zip(self.blocks, states[1:], strict=True)):
            share = self.cast(mu[i], h)
            s = self.block(block, share * s + (1 - share) * nn.functional.linear(t, self.cast(self.D[i + 1], h)))
        if not (self.training and getattr(self.layer, "gradient_checkpointing", False)):  # else the layer runs again
            for tap in self.seen:
                tap.x = None
        d = nn.functional.linear(s, self.cast(self.U, h))
        return d.movedim(-1, 1) if channels_second else d

    def block(self, b: Block, s: Tensor) -> Tensor:
        z = nn.functional.layer_norm(s, s.shape[-1:], self.cast(b.norm.weight, s), self.cast(b.norm.bias, s))
        z = nn.functional.gelu(nn.functional.linear(z, self.cast(b.up.weight, s), self.cast(b.up.bias, s)))
        return s + nn.functional.linear(z, self.cast(b.down.weight, s), self.cast(b.down.bias, s))

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.U.mul_(c)
        return True
