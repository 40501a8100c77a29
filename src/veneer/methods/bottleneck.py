"""Bottleneck adapters: a small MLP after or beside a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..code import own_class
from ..errors import PlanError
from ..sites import Site
from .activations import ACTIVATIONS
from .base import Build, Method
from .drop import Droppable, draw, ready
from .part import Part, like, module_at
from .parts import OutputPart


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapter (Houlsby et al., ICML 2019, arXiv 1902.00751; Pfeiffer et al., EACL 2021, arXiv 2005.00247;
    parallel and scaled: He et al., ICLR 2022, arXiv 2110.04366).

        sequential  h' = h + s · f(h)        parallel  h' = h + s · f(x)
        f(z) = W_up · act(W_down · norm(z) + b_down) + b_up,   W_down (n, d), W_up (d, n)

    h leaves a block (attention or FFN) before its residual add; x enters that block. At 'layer' h is the residual stream
    itself, behind the layer's last norm in post-norm models.

    size       n, the bottleneck's width; or
    reduction  d / n, where `size` is not given (16 is Pfeiffer's)
    at         'ffn' (default; Pfeiffer), 'attn', or 'attn,ffn' (Houlsby)
    parallel   read the block's input x in place of h; False by default
    residual   read the residual stream r, as AdapterHub's seq_bn and par_bn do: f(LN(h + r)), with the norm that follows the
               addition in post-norm models (and f(h + r) in pre-norm ones); in parallel f(r), from before the block's norm.
               False by default. Found by one call of the model at attaching
    activation 'relu' by default; gelu, swish/silu, tanh, sigmoid, leakyrelu, identity
    scale      s: a number (1 by default; He et al. use 4 in parallel), or 'learnt' (starts at 1)
    norm       a LayerNorm before W_down, of its own; False by default
    dropout    on f's output while training; 0 by default
    drop       AdapterDrop (Rücklé et al., EMNLP 2021, arXiv 2010.11918): every training step leaves the adapters of the 0 to
               `drop` lowest layers out, a number drawn for each step; 0 (default) leaves none out (the paper: up to all but
               one). Under DDP give find_unused_parameters=True then
    skip       how many of the lowest layers go without outside of training, and in it where drop=0; see also vn.skip

    Other widths in other layers are a sum: Bottleneck(reduction=16, at='ffn@:6') + Bottleneck(reduction=4, at='ffn@6:').
    W_up and b_up are zero at the start, so h' = h; W_down ~ N(0, 0.02²). Parameters: 2 n d + n + d a site
    (894,528 on BERT-base with n = 48). Raises: PlanError.
    """

    name = "bottleneck"
    family = "additive"
    ports = ("hidden",)
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366, 2010.11918"
    default_at = "ffn"
    rate = (5e-4, "UniPELT's for all submodules together, 5e-4; alone 1e-4 (Mao et al. 2022, A.1)")

    size: int | None = None
    reduction: float | None = None
    parallel: bool = False
    activation: str = "relu"
    scale: float | str = 1.0
    norm: bool = False
    dropout: float = 0.0
    drop: int = 0
    skip: int = 0
    residual: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.reduction is None):
            raise self._fail("give either size or reduction", "For example vn.Bottleneck(48) or vn.Bottleneck(reduction=16)")
        if self.size is not None:
            self._positive(size=self.size)
        if self.reduction is not None:
            self._finite(reduction=self.reduction)
            if self.reduction <= 0:
                raise self._fail(f"reduction must be positive, not {self.reduction!r}")
        self._one_of(ACTIVATIONS, activation=self.activation)
        if self.scale != "learnt":
            if isinstance(self.scale, str):
                raise self._fail(f"scale must be a number or 'learnt', not {self.scale!r}")
            self._finite(scale=self.scale)
        self._share(dropout=self.dropout)
        self._bool(parallel=self.parallel, norm=self.norm, residual=self.residual)
        self._count(drop=self.drop, skip=self.skip)
        self._pattern()

    @property
    def steady(self) -> bool:
        return self.drop == 0

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        draw(parts, step)

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        from ..residual import streams

        made = list(super().parts(sites, build))
        found = streams(build.model, [s for s, _ in made]) if self.residual else {}
        for site, part in made:
            if site in found:
                part.enter = found[site].enter
                if found[site].norm and not self.parallel:
                    norm = module_at(build.model, found[site].norm)
                    part.__dict__["behind"] = norm, own_class(norm).forward  # the base's own, without what is attached to it
            yield site, part

    def part(self, site: Site, build: Build) -> Part:
        size = self.size if self.size is not None else max(1, round(site.width / self.reduction))  # type: ignore[operator]
        if size > 16 * site.width:
            raise PlanError(f"Bottleneck: size {size} is over 16 times the width {site.width}", where=site.path)
        return BottleneckPart(site, build, self, size)


class BottleneckPart(Droppable, OutputPart):
    behind: Any = None

    def __init__(self, site: Site, build: Build, m: Bottleneck, size: int) -> None:
        super().__init__(site)
        new, d = like(build, site), site.width
        self.down = nn.Parameter(torch.empty(size, d, **new).normal_(std=0.02))
        self.down_bias = nn.Parameter(torch.zeros(size, **new))
        self.up = nn.Parameter(torch.zeros(d, size, **new))
        self.up_bias = nn.Parameter(torch.zeros(d, **new))
        self.norm = nn.LayerNorm(d, **new) if m.norm else None
        self.scale = nn.Parameter(torch.ones(1, **new)) if m.scale == "learnt" else float(m.scale)
        self.parallel, self.activation, self.dropout = m.parallel, ACTIVATIONS[m.activation], m.dropout
        self.reads_state, self.residual = not m.parallel, m.residual
        ready(self, m.skip, m.drop)

    def sees(self, x: Tensor, h: Tensor) -> Tensor:
        if self.parallel or not self.residual:
            return super().sees(x, h)
        return h + x if self.behind is None else self.behind[1](self.behind[0], h + x)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        z = self.sees(x, h)
        channels_second = z.shape[-1] != self.down.shape[1]  # images as (B, C, *space)
        if channels_second:
            z = z.movedim(1, -1)
        if self.norm is not None:
            z = nn.functional.layer_norm(z, (z.shape[-1],), self.cast(self.norm.weight, z), self.cast(self.norm.bias, z), self.norm.eps)
        z = self.activation(nn.functional.linear(z, self.cast(self.down, z), self.cast(self.down_bias, z)))
        z = nn.functional.linear(z, self.cast(self.up, z), self.cast(self.up_bias, z))
        if self.dropout:
            z = nn.functional.dropout(z, self.dropout, self.training)
        if isinstance(self.scale, Tensor):
            z = z * self.cast(self.scale, z)
        elif self.scale != 1:
            z = z * self.scale
        return z.movedim(-1, 1) if channels_second else z

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.up.mul_(c)
            self.up_bias.mul_(c)
        return True
