"""Low-rank parts: dW = s · B A, from whatever factors the method makes, applied without ever building dW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..sites import Site
from .base import Build, Method
from .part import Bank, Part, like, module_at
from .parts import MapPart


class LowRankPart(MapPart):
    """dy = s · B A x, with A (r, in) and B (out, r) from `pair`; experts have a leading E.

    Vectors that scale rank or features belong in `pair`: scaling a factor costs r (in + out) numbers, scaling the
    activations r or out numbers for every token. Given factors, vn.optimize runs any such part with its map.
    """

    scale: float = 1.0
    dropout: float = 0.0
    gains: Callable[[Tensor, Tensor], Tensor] | None = None  # g (out,) of (A, B), where y = g ⊙ (W x + s · B A x) + b

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they are now, in the parameters' dtype."""
        raise NotImplementedError

    def entry(self, x: Tensor) -> Tensor:
        """What A is applied to."""
        if self.dropout and self.training and x.is_floating_point():
            return nn.functional.dropout(x, self.dropout)
        return x

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the deviation s · B A entry(x), in x's dtype."""
        a, b = self.pair()
        return self.cast(a, x), self.cast(b, x), self.scale

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair()
        z = self.map.down(self.entry(x), self.cast(a, h))
        return self.map.up(z * self.scale if self.scale != 1 else z, self.cast(b, h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = self.pair()
        return self.scale * (up.to(w.dtype) @ down.to(w.dtype)), None

    def shared(self, name: str) -> Tensor:
        """A tensor of the method's bank, where this part's own are."""
        own = next(t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None)
        return getattr(self.bank, name).to(own.device)

    def _scaled(self, c: float, *names: str) -> bool:
        with torch.no_grad():
            for name in names:
                getattr(self, name).mul_(c)
        return True


def check_rank(who: str, r: int, site: Site) -> None:
    """Raise PlanError where rank r is over that of the site's matrix."""
    full = min(site.out, site.inp)
    if r > full:
        raise PlanError(f"{who}: rank {r} is over the rank {full} of the {site.out} x {site.inp} matrix", where=site.path, fix=f"Use r={full} or less")


def lead(site: Site) -> tuple[int, ...]:
    """The dimensions in front of a site's matrices: experts."""
    return (site.experts,) if site.experts else ()


def kaiming(t: Tensor, fan: int, gain: float = 1 / math.sqrt(3)) -> Tensor:
    """U(-k, k), k = gain · sqrt(3 / fan); the default gain gives LoRA's 1/sqrt(fan), sqrt(2) He's for ReLUs."""
    k = gain * math.sqrt(3 / fan)
    return t.uniform_(-k, k) if not t.is_meta else t


class Projections(Bank):
    """Matrices that all parts of a method use, each as large as the largest map needs; a smaller map takes the leading
    rows or columns. `trained` are parameters, the others are saved and stay."""

    def __init__(self, build: Build, trained: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.trained = trained
        self.__dict__["new"] = like(build, self.site)
        for name, shape in shapes.items():
            self._hold(name, shape)

    def _hold(self, name: str, shape: tuple[int, ...]) -> None:
        zeros = torch.zeros(shape, **self.new)  # type: ignore[arg-type]
        if name in self.trained:
            self.register_parameter(name, nn.Parameter(zeros))
        else:
            self.frozen(name, zeros)

    def unfold(self, saved: dict[str, Any]) -> None:
        """Take a file's larger matrices: what is left of an adapter after vn.settle may need less of them."""
        for name, own in list(self.state_dict(keep_vars=True).items()):
            t = saved.get(name)
            if t is not None and t.dim() == own.dim() and t.shape != own.shape and all(a >= b for a, b in zip(t.shape, own.shape, strict=True)):
                self._hold(name, tuple(t.shape))


def with_bank(m: Method, sites: Callable[..., list[Site]], build: Build, bank_of: Callable[[list[Site]], Bank]) -> Iterator[tuple[Site, Part]]:
    """What Method.parts yields for a method whose parts share the bank that `bank_of` makes for the chosen sites."""
    chosen = sites(m.at, "weight", m.default_at)
    bank = bank_of(chosen)
    yield bank.site, bank
    for site in chosen:
        build.module = module_at(build.model, site.path)
        part = m.part(site, build)
        part.__dict__["bank"] = bank
        yield site, part
