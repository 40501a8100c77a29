"""WaveFT: dW is the inverse wavelet transform of a few learnt coefficients."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.sparse import sparse_product
from ..sites import Site
from .base import Build, Method
from .fourierft import drawn
from .part import Part, like
from .parts import DeltaPart

FAMILIES = {"db": (2, 1, 38), "sym": (2, 2, 20), "coif": (6, 1, 17)}  # length of the filter over the order; orders


@dataclass(frozen=True)
class WaveFT(Method):
    """Wavelet fine-tuning (Bilican et al., 2025, arXiv 2505.12532).

        y = W x + b + s · (U C Vᵀ) x,   U (out, p), V (in, q) the synthesis of a one-level wavelet transform;
        C (p, q) has the learnt numbers c (n) at n random places, zeros elsewhere

    at        any maps; default 'attn.{q,v}'
    n         coefficients for each map; 2592 by default, as in Hugging Face PEFT (what LoRA of rank 1 has in SDXL's maps)
    scale     s; 25 by default (PEFT's, the paper's for SDXL)
    wavelet   'db1' (Haar; default), 'db2' … 'db38', 'sym2' … 'sym20', 'coif1' … 'coif17': all but Haar's filters come from
              PyWavelets, once: they are saved with the adapter. None: no transform, C itself (the paper's ablation)
    seed      of the places, the same for maps of the same size; 777 by default, as in PEFT

    c is zero at the start. p = out + L - 2 for a filter of length L, and one more where that is odd; q likewise. Parameters: n
    for each map. Raises: PlanError for more coefficients than the matrix has entries, or a wavelet that is not to be had.
    """

    name = "waveft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2505.12532"
    mergeable = True
    default_at = "attn.{q,v}"
    kinds = ("linear", "transposed", "conv", "embedding", "tensor")

    n: int = 2592
    scale: float = 25.0
    wavelet: str | None = "db1"
    seed: int = 777
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(n=self.n)
        self._finite(scale=self.scale, seed=self.seed)
        if self.wavelet is not None and not self.taps():
            raise self._fail(f"wavelet is {self.wavelet!r}", "Give one of db1 to db38, sym2 to sym20, coif1 to coif17, or None")
        self._pattern()

    def taps(self) -> int:
        """The length of the wavelet's filter, 2 without one; 0 for what is none."""
        if self.wavelet is None:
            return 2
        match = re.fullmatch(r"(db|sym|coif)([1-9]\d?)", str(self.wavelet))
        each, first, last = FAMILIES[match[1]] if match else (0, 0, -1)
        return each * int(match[2]) if match and first <= int(match[2]) <= last else 0

    def part(self, site: Site, build: Build) -> Part:
        if self.n > site.out * site.inp:
            raise self._fail(f"n={self.n} is over the {site.out * site.inp} entries of {site.path}", f"Use n={site.out * site.inp} or less")
        return WavePart(site, build, self)

    def low(self) -> Tensor:
        """The low-pass filter of the synthesis."""
        if self.taps() == 2:
            return torch.full((2,), math.sqrt(0.5))
        if find_spec("pywt") is None:
            raise self._fail(f"the filters of {self.wavelet!r} come from PyWavelets, which is not installed", 'pip install "veneer[wavelets]", or use db1')
        import pywt  # pyright: ignore[reportMissingImports]

        return torch.tensor(pywt.Wavelet(self.wavelet).rec_lo)


class WavePart(DeltaPart):
    def __init__(self, site: Site, build: Build, m: WaveFT) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.scale, self.plain = m.scale, m.wavelet is None
        self.sizes = tuple(n if self.plain else n + m.taps() - 2 + n % 2 for n in (site.out, site.inp))
        self.frozen("index", drawn(m.n, site.out * site.inp, m.seed, new["device"]))
        self.frozen("lo", torch.empty(m.taps(), **new) if build.blank else m.low().to(**new))
        self.c = nn.Parameter(torch.zeros(m.n, **new))

    def located(self) -> Tensor:
        """Where each number lies in C, flat. Places are drawn in an (out, in) matrix in the middle of C; and what lies in
        one of the two mixed quarters is, by the convention that names a quarter by its detail, the other's."""
        index, pad = self.index.long(), 0 if self.plain else len(self.lo) // 2 - 1
        u, v = index.div(self.site.inp, rounding_mode="floor") + pad, index % self.site.inp + pad
        if not self.plain:
            p, q = (n // 2 for n in self.sizes)
            mixed = (u < p) != (v < q)
            u, v = torch.where(mixed, (u + p) % (2 * p), u), torch.where(mixed, (v + q) % (2 * q), v)
        return u * self.sizes[1] + v

    def filters(self, x: Tensor) -> Tensor:
        """The two filters, (2, 1, L): low-pass and, alternating in sign and reversed, high-pass."""
        lo = self.cast(self.lo, x)
        hi = lo.flip(0).clone()
        hi[1::2] *= -1
        return torch.stack([lo, hi])[:, None]

    def synthesis(self, z: Tensor, n: int) -> Tensor:
        """U z (…, n) for coefficients z (…, p)."""
        w = self.filters(z)
        y = F.conv_transpose1d(z.reshape(-1, 2, z.shape[-1] // 2), w, stride=2, padding=w.shape[-1] - 2)
        return y[:, 0, :n].unflatten(0, z.shape[:-1])

    def analysis(self, x: Tensor) -> Tensor:
        """Vᵀ x (…, q) for x (…, in)."""
        w, n = self.filters(x), x.shape[-1]
        z = F.conv1d(F.pad(x.reshape(-1, 1, n), (0, n % 2)), w, stride=2, padding=w.shape[-1] - 2)
        return z.flatten(1).unflatten(0, x.shape[:-1])

    def delta(self) -> Tensor:
        dense = self.c.new_zeros(math.prod(self.sizes)).index_copy(0, self.located(), self.c * self.scale).reshape(self.sizes)
        if self.plain:
            return dense
        return self.synthesis(self.synthesis(dense, self.site.inp).t(), self.site.out).t()

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.map.plain:
            return super().deviation(x, h)
        # U and V act along one side each, as filters, so x is transformed and not C: T (n + L (in + out)), not T in out
        x = x.to(h.dtype)
        z = x if self.plain else self.analysis(x)
        z = sparse_product(z, self.cast(self.c * self.scale, h), self.located(), self.sizes[0])
        return z if self.plain else self.synthesis(z, self.site.out)

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.c.mul_(c)
        return True
