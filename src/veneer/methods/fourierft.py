"""FourierFT: dW is the inverse Fourier transform of a few learnt frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import DeltaPart


@dataclass(frozen=True)
class FourierFT(Method):
    """Fourier transform fine-tuning (Gao et al., ICML 2024, arXiv 2405.03003).

        y = W x + b + s · Re(F⁻¹ C) x,   C (out, in) has the learnt numbers c (n) at n random frequencies, zeros elsewhere

    at        any maps; default 'attn.{q,v}' (the paper's)
    n         frequencies for each map; 1000 by default (the paper's, for RoBERTa)
    scale     s; 150 by default (the paper's alpha for RoBERTa; 300 for LLaMA). F⁻¹ divides by out · in, so it is large
    seed      of the frequencies, the same for maps of the same size; 777 by default, as in Hugging Face PEFT

    c is zero at the start. Parameters: n for each map. Raises: PlanError for more frequencies than the matrix has entries.
    """

    name = "fourierft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2405.03003"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    n: int = 1000
    scale: float = 150.0
    seed: int = 777
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(n=self.n)
        self._finite(scale=self.scale, seed=self.seed)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        if self.n > site.out * site.inp:
            raise self._fail(f"n={self.n} is over the {site.out * site.inp} entries of {site.path}", f"Use n={site.out * site.inp} or less")
        return FourierPart(site, build, self)


class FourierPart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: FourierFT) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.sizes, self.scale = (site.out, site.inp), m.scale
        self.frozen("index", drawn(m.n, site.out * site.inp, m.seed, new["device"]))
        self.c = nn.Parameter(torch.zeros(m.n, **new))

    def located(self) -> tuple[Tensor, Tensor]:
        """Row and column of each number."""
        index = self.index.long()
        return index.div(self.sizes[1], rounding_mode="floor"), index % self.sizes[1]

    def delta(self) -> Tensor:
        c = self.c.float()
        dense = c.new_zeros(self.sizes).index_put(self.located(), c)
        return (torch.fft.ifft2(dense).real * self.scale).to(self.c.dtype)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        # The transform is separable, so it is applied to x and not to C: F⁻¹ over the inputs, the n frequencies, F⁻¹
        # over the outputs. That is T n + FFTs, where the matrix would take T in out
        u, v = self.located()
        with torch.autocast(x.device.type, enabled=False):  # there is no FFT in bf16
            z = torch.fft.ifft(x.float(), dim=-1).index_select(-1, v) * self.c.float()
            z = z.new_zeros(*x.shape[:-1], self.sizes[0]).index_add(-1, u, z)
            return (torch.fft.ifft(z, dim=-1).real * self.scale).to(h.dtype)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.c.mul_(c)
        return True


def drawn(n: int, of: int, seed: int, device: torch.device) -> Tensor:
    """n of the numbers under `of`, as int32, the same for a seed on every device."""
    if device.type == "meta":
        return torch.empty(n, dtype=torch.int32, device=device)
    return torch.randperm(of, generator=torch.Generator().manual_seed(int(seed)))[:n].to(device, torch.int32)
