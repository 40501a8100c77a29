"""PSOFT: the leading singular subspace of W is rotated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .lora_xs import Between
from .lowrank import check_rank, lead
from .orthogonal import cayley, skew
from .part import Part, like


@dataclass(frozen=True)
class PSOFT(Method):
    """Orthogonal fine-tuning in the principal subspace (Wu et al., ICLR 2026, arXiv 2505.11235).

        y = W x + b + B (diag(β) R diag(α) - 1) A x,   R = (1 + Q)(1 - Q)⁻¹,   Q = -Qᵀ (r, r)

    with A = V_r (r, in) and B = U_r S_r (out, r) of W = U S V, frozen: what W does in its r leading directions is turned
    within them, and the rest of W stays.

    at          any maps; default 'attn.{q,v}'
    r           32 by default, as in Hugging Face PEFT (the paper: 32 to 256)
    orthogonal  False: a free matrix in place of R. On by default
    before, after  train α, β, which let go of the angles a little; on by default (the paper's)
    even        S goes half to A and half to B, as its root (PiSSA's way); off by default
    series      None (default): the exact inverse; a number: that many terms of its series (OFTv2)
    constrain   with `series`: keep |Q| within this; None by default
    niter, seed iterations of a randomised SVD, and its seed; None (default) is the exact SVD
    dropout     on x before A, while training; 0 by default

    Q is zero at the start, α and β are one. A and B are saved, since singular vectors are the base's only up to their signs.
    The paper's scale α / r divides B and multiplies the result, so it has no effect and no option. The deviation is not
    linear in its parameters: a gate's constant stays a gate.

    Parameters: r (r - 1) / 2 + 2 r a map. Raises: PlanError for a rank above the matrix's, for options that go
    against each other; CapabilityError where the base's weight cannot be had.
    """

    name = "psoft"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2505.11235"
    mergeable = True
    default_at = "attn.{q,v}"

    r: int = 32
    orthogonal: bool = True
    before: bool = True
    after: bool = True
    even: bool = False
    series: int | None = None
    constrain: float | None = None
    niter: int | None = None
    seed: int = 0
    dropout: float = 0.0
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(r=self.r)
        self._bool(orthogonal=self.orthogonal, before=self.before, after=self.after, even=self.even)
        self._share(dropout=self.dropout)
        self._count(seed=self.seed)
        self._pattern()
        for key in ("series", "niter"):
            if getattr(self, key) is not None:
                self._positive(**{key: getattr(self, key)})
        if self.series is not None and self.series < 3:
            raise self._fail(f"{self.series} terms are not enough for a rotation", "Use series=5, or None for the exact one")
        if self.constrain is not None:
            self._finite(constrain=self.constrain)
            if self.series is None or self.constrain <= 0:
                raise self._fail(f"constrain={self.constrain} is a positive bound for a series", "Give series=5 too, or constrain=None")
        if not self.orthogonal and self.series is not None:
            raise self._fail("a free matrix has no series", "Leave series out, or take orthogonal=True")

    def part(self, site: Site, build: Build) -> Part:
        check_rank("PSOFT", self.r, site)
        return PSOFTPart(site, build, self)


class PSOFTPart(Between):
    """Q: the entries above its diagonal, (r (r-1) / 2). D (r, r): the free matrix less 1."""

    before: Tensor | None
    after: Tensor | None

    def __init__(self, site: Site, build: Build, m: PSOFT) -> None:
        super().__init__(site, build, m.r, m.even, m.niter, m.seed)
        new = like(build, site)
        if m.orthogonal:
            self.Q = nn.Parameter(torch.zeros(*lead(site), m.r * (m.r - 1) // 2, **new))
        else:
            self.D = nn.Parameter(torch.zeros(*lead(site), m.r, m.r, **new))
        for name in ("before", "after"):
            self.register_parameter(name, nn.Parameter(torch.ones(*lead(site), m.r, **new)) if getattr(m, name) else None)
        self.r, self.series, self.constrain, self.dropout = m.r, m.series, m.constrain, m.dropout

    def turn(self) -> Tensor:
        """R - 1."""
        if "D" in self._parameters:
            return self.D
        q = skew(self.Q, self.r)
        if self.constrain is not None:
            q = q * (self.constrain / torch.linalg.matrix_norm(q, keepdim=True).clamp(min=self.constrain))
        return cayley(q, self.series)

    def core(self) -> Tensor:
        """β R α - 1 = β (R - 1) α + (β α - 1): just zero at the start."""
        turn = self.turn()
        gain = turn.new_ones(*turn.shape[:-2], self.r)
        if self.after is not None:
            turn, gain = self.after.unsqueeze(-1) * turn, gain * self.after
        if self.before is not None:
            turn, gain = turn * self.before.unsqueeze(-2), gain * self.before
        return turn + torch.diag_embed(gain - 1)
