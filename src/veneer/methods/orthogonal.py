"""What orthogonal methods share: a rotation R of a map's input, as the deviation (R - 1) x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PlanError
from ..sites import Site
from .base import Build
from .parts import InputPart


class TurnPart(InputPart):
    """y = W R x + b, as dx = (R - 1) x: R meets the activations, so no product with W is made while training.

    A convolution's input is rotated over its channels, at every position alike, so R = 1 is the base whatever the kernel.
    A slice of a fused projection shares its input with the others, so there dy = W (R - 1) x with the slice's own rows.
    """

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site, build)
        self.kernel = math.prod(getattr(self.map, "kernel", ()))
        self.channels = site.inp // self.kernel
        if getattr(self.map, "groups", 1) > 1:
            raise PlanError("a grouped convolution's input cannot be rotated as a whole", where=site.path, fix="Leave it out: at='…,!name:…'")
        if site.slice is not None and not self.map.read_by_others:
            self.acts = "output"  # type: ignore[misc]

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """(R - 1) x over the last dimension; `back`: (R^T - 1) x."""
        raise NotImplementedError

    def inward(self, x: Tensor) -> Tensor:
        if self.map.out_dim != 1:
            return self.turn(x)
        return self.turn(x.movedim(1, -1)).movedim(-1, 1)

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.apply(self.inward(x), self.cast(self.weight(), h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = w.unflatten(-1, (self.channels, self.kernel)).transpose(-1, -2)  # a row w of W becomes w R
        return self.turn(rows, back=True).transpose(-1, -2).flatten(-2), None


def skew(vector: Tensor, n: int) -> Tensor:
    """Q = U - U^T (…, n, n), whose entries above the diagonal are `vector` (…, n (n-1) / 2), row by row."""
    rows, cols = torch.triu_indices(n, n, 1, device=vector.device)
    q = vector.new_zeros(*vector.shape[:-1], n * n).index_copy(-1, rows * n + cols, vector).unflatten(-1, (n, n))
    return q - q.transpose(-1, -2)


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """X - 1 for the orthogonal X = (1 + Q)(1 - Q)⁻¹ of a skew Q: 2 Q (1 - Q)⁻¹, or with `terms` its series' first ones,

    X ≈ 1 + 2 Q + … + 2 Q^(terms-2) + Q^(terms-1)  (orthogonal up to an error of that order).
    """
    if terms is None:
        one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return torch.linalg.solve(one - q, 2 * q, left=False)
    out, power = 2 * q, q
    for k in range(2, terms):
        power = power @ q
        out = out + (2 * power if k < terms - 1 else power)
    return out


def blocks(x: Tensor, m: Tensor, back: bool) -> Tensor:
    """Each piece of x times its own matrix of m (n, b, b): x_i M_i, or x_i M_i^T."""
    z = x.unflatten(-1, (-1, m.shape[-1]))
    return torch.einsum("...nk,nck->...nc" if back else "...nk,nkc->...nc", z, m).flatten(-2)


def divides(who: str, block: int, part: TurnPart) -> None:
    """Raises: PlanError, with the sizes that do, unless `block` divides the part's channels."""
    if part.channels % block:
        able = [d for d in range(2, min(part.channels, 512) + 1) if part.channels % d == 0]
        raise PlanError(f"{who}: block={block} does not divide the {part.channels} inputs", where=part.site.path, fix=f"Blocks that do: {able}")
