"""Invertible adapters: what enters the first layer is transformed, and the transformation undone before a tied head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .activations import ACTIVATIONS
from .base import Build, Method
from .part import Bank, Part, like, module_at


@dataclass(frozen=True)
class Invertible(Method):
    """Invertible adapter for embeddings (MAD-X; Pfeiffer et al., EMNLP 2020, arXiv 2005.00052): a NICE coupling.

        y₁ = x₁ + F(x₂),  y₂ = x₂ + G(y₁)        x = [x₁; x₂] the embedding output (with positions and norm, as the first
        x₂ = y₂ - G(y₁),  x₁ = y₁ - F(x₂)        layer gets it), and the inverse before an output layer tied to the embeddings
        F(z) = W_up · act(W_down z + b) + c

    reduction  of x₂'s width in F and x₁'s in G; 2 by default (AdapterHub's)
    activation 'relu' by default (AdapterHub's); as in vn.Bottleneck
    at         'layer@0' (default): the input of every tower's first layer

    Where no head is tied to the token embedding (a classifier), there is no inverse. Together with a language's bottleneck,
    under the task's: vn.Invertible() + vn.Bottleneck(reduction=2) >> vn.Bottleneck(reduction=16). W_up and c start at 0, so
    y = x. Under a gate each direction is scaled, and the one undoes the other only at g = 0 and 1. Parameters: about
    d² / 2 with reduction 2. Raises: PlanError.
    """

    name = "invertible"
    family = "additive"
    ports = ("hidden",)
    paper = "arXiv 2005.00052"
    default_at = "layer@0"
    tied = False  # it acts on the embedding and, in reverse, before the tied head

    reduction: float = 2.0
    activation: str = "relu"
    at: str | None = None

    def __post_init__(self) -> None:
        self._finite(reduction=self.reduction)
        if self.reduction <= 0:
            raise self._fail(f"reduction must be positive, not {self.reduction!r}")
        self._one_of(ACTIVATIONS, activation=self.activation)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        couplings: dict[str, Coupling] = {}
        for site in sites(self.at, "hidden", self.default_at):
            if site.width < 2:
                raise self._fail(f"{site.path} has one channel, which cannot be split")
            bank = couplings.get(site.tower)
            if bank is None:
                bank = couplings[site.tower] = Coupling(replace(site, path="", enter=""), like(build, site), self)
                yield bank.site, bank
            yield site, CouplingPart(site, bank, 1)
        maps = sites("all", "weight", "")
        tables = {id(weight(build.model, s)) for s in maps if s.kind == "embedding" and s.role == "embed"}
        for site in maps:
            if site.role == "head" and site.kind == "linear" and id(weight(build.model, site)) in tables:
                bank = couplings.get(site.tower) or list(couplings.values())[-1]
                if bank.width == site.inp:
                    head = Site(site.path, "hidden", "head", tower=site.tower, enter=site.path, width=site.inp, causal=site.causal)
                    yield head, CouplingPart(head, bank, -1)


def weight(model: nn.Module, site: Site) -> Any:
    return module_at(model, site.path)._parameters.get(site.tensor or "weight")


class Coupling(Bank):
    """F and G."""

    def __init__(self, site: Site, new: dict[str, Any], m: Invertible) -> None:
        super().__init__(site.port)
        self.site = site
        self.width = site.width
        self.first = site.width - site.width // 2
        self.activation = ACTIVATIONS[m.activation]
        second = site.width - self.first
        for name, inp, out in (("F", second, self.first), ("G", self.first, second)):
            inner = max(1, int(inp / m.reduction))
            self.register_parameter(f"{name}_down", nn.Parameter(torch.empty(inner, inp, **new).normal_(std=0.02)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(inner, **new)))
            self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(out, inner, **new)))
            self.register_parameter(f"{name}_end", nn.Parameter(torch.zeros(out, **new)))

    def half(self, name: str, z: Tensor) -> Tensor:
        down, bias, up, end = (self.cast(getattr(self, f"{name}_{k}"), z) for k in ("down", "bias", "up", "end"))
        return nn.functional.linear(self.activation(nn.functional.linear(z, down, bias)), up, end)

    def change(self, x: Tensor, direction: int) -> Tensor:
        """E(x) - x, or with direction -1 E⁻¹(x) - x."""
        a, b = x[..., : self.first], x[..., self.first :]
        if direction > 0:
            da = self.half("F", b)
            return torch.cat([da, self.half("G", a + da)], -1)
        db = -self.half("G", a)
        return torch.cat([-self.half("F", b + db), db], -1)


class CouplingPart(Part):
    """The transformation of a module's input (direction 1), or its inverse (-1)."""

    acts = "input"

    def __init__(self, site: Site, bank: Coupling, direction: int) -> None:
        super().__init__(site)
        self.__dict__["bank"] = bank
        self.direction = direction

    def inward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.bank.width:  # images as (B, C, *space)
            return self.bank.change(x.movedim(1, -1), self.direction).movedim(-1, 1)
        return self.bank.change(x, self.direction)
