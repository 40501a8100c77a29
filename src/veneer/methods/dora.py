"""DoRA: LoRA on the directions of W's rows, and a learnt length for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.skinny import narrow
from ..ops.weights import answers, plain
from ..sites import Site
from .base import Build, Method
from .factors import LoRAPart
from .lora import LoRA
from .matrices import wide
from .part import Part


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., ICML 2024, arXiv 2402.09353).

        y = g ⊙ ((W + s B A) x) + b,   g = m / ‖W + s B A‖ for each output row,   m = ‖W‖ at the start

    The norm is treated as a constant in the backward pass (the paper's section 4.3). It never needs W + s B A:
    ‖W + s B A‖² = ‖W‖² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B row by row, where ‖W‖² is computed once, so a step costs one product
    of W with r vectors. Rows are outputs everywhere: a convolution's channels, an embedding's dimensions, each expert's.

    at, r, alpha, init, rank_stabilized, b_rate, freeze_a, ranks, alphas, tied, rho, niter  as LoRA's, with its
              `starts`; the paper halves LoRA's rank and keeps its alpha
    dropout   on x before A, while training; 0 by default. It acts on the low-rank term alone

    The deviation is not linear in the parameters, so a gate's constant cannot be folded into them; it merges all the same.

    Parameters: r (in + out) + out for each map. Raises: as LoRA.
    """

    name = "dora"
    holds = ""
    paper = "arXiv 2402.09353"

    def ungated(self) -> Method:
        return self

    def scale(self, build: Build) -> float:
        return super().scale(Build(build.model))  # a gate scales the whole deviation here, not s

    def part(self, site: Site, build: Build) -> Part:
        return DoRAPart(site, build, self)


class DoRAPart(LoRAPart):
    square: Tensor
    factors = None  # type: ignore[assignment]  # its deviation reads the map's own output, too

    def __init__(self, site: Site, build: Build, m: DoRA) -> None:
        super().__init__(site, build, m)
        p = self.module._parameters.get(site.tensor or "weight")
        self.packed = not (p is not None and p.is_floating_point() and plain(p, site))
        square = wide(self.weight()).square().sum(-1)
        self.register_buffer("square", square, persistent=False)  # ‖W‖², a function of the base
        self.m = nn.Parameter(square.sqrt().to(**self.new))

    def gains(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """g, in fp32 at least."""
        with torch.no_grad():
            a, b = wide(a), wide(b)
            # 2 s W Aᵀ + s² B (A Aᵀ), row by row onto B
            grown = torch.add(b @ (a @ a.mT) * self.scale**2, self.through(a).to(b.dtype), alpha=2 * self.scale)
            norm = (self.square.to(b.dtype) + (grown * b).sum(-1)).clamp_(min=1e-30).sqrt_()
        return self.m.to(norm.dtype) / norm

    def through(self, a: Tensor) -> Tensor:
        """W Aᵀ (out, r); of a packed weight, what the module itself makes of A's rows, so that W is never unpacked."""
        p = self.module._parameters.get(self.site.tensor or "weight")
        if self.packed:
            return self.map.canonical(answers(self.module, a, p))
        w = self.map.canonical(p.detach())  # type: ignore[union-attr]
        return narrow(w, a.to(w.dtype), 1.0) if w.dim() == 2 else w @ a.mT.to(w.dtype)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair()
        g = self.gains(a, b)
        z = self.map.down(self.entry(x), self.cast(a, h))
        low = self.map.up(z, self.cast(g.unsqueeze(-1) * self.scale * b, h))  # g scales B's rows rather than every token
        return self.map.features(self.cast(g - 1, h), h) * self.bare(h) + low

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = self.pair()
        g = self.gains(down, up).unsqueeze(-1).to(w.dtype)
        dw = (g - 1) * w + g * self.scale * (up.to(w.dtype) @ down.to(w.dtype))
        bias = self.bias()
        return dw, None if b is None or bias is None else (g.squeeze(-1) - 1) * (b - bias.to(b.dtype))

    def scale_by(self, c: float) -> bool:
        return c == 1.0
