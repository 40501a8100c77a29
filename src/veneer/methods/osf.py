"""OSF: W's minor singular directions are trained, and its leading ones protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..ops.fresh import fresh
from ..plan import short
from ..sites import Site
from .base import Build, Method
from .lowrank import LowRankPart, lead
from .matrices import svd, wide
from .part import Part, like


@dataclass(frozen=True)
class OSF(Method):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv 2504.07097), for tasks one after the other.

        y = W x + b + (U S V - U_0 S_0 V_0) x,   W = U_h S_h V_h + U_0 S_0 V_0,   U (out, k), S (k), V (k, in)

    U_h S_h V_h are W's `keep` leading singular triplets, which stay; the other k are trained, from U_0 S_0 V_0. Gradients are
    projected: dU ← (1 - U_h U_hᵀ) dU,  dV ← dV (1 - V_hᵀ V_h), so that steps do not go along what is kept.

    at    any maps; default 'attn.{q,v}'
    keep  a share (under 1) of min(out, in), 0.5 by default as in Hugging Face PEFT; or a number of directions

    The paper writes the trained triplets into W; here they are a deviation, so the base stays, and both U S V and the frozen
    U_0 S_0 V_0 are held and saved. With many directions that is as large as full fine-tuning: keep=0.95 is thin. For a next
    task, vn.merge, and attach anew.

    Parameters: k (out + in + 1) a map, k = min(out, in) - keep. Raises: PlanError where nothing is kept or trained;
    CapabilityError where the base's weight cannot be had.
    """

    name = "osf"
    family = "reparameterisation"
    ports = ("weight",)
    paper = "arXiv 2504.07097"
    mergeable = True
    default_at = "attn.{q,v}"
    rate = (5e-5, "Hugging Face PEFT's advice for OSF, 1e-5 to 1e-4")

    keep: float = 0.5
    at: str | None = None

    def __post_init__(self) -> None:
        self._finite(keep=self.keep)
        if self.keep <= 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise self._fail(f"keep is {short(self.keep)}", "Give a share under 1, as 0.5, or a number of directions, as 64")
        self._pattern()

    def trained(self, site: Site) -> int:
        """k at this site."""
        full = min(site.out, site.inp)
        kept = int(full * self.keep) if self.keep < 1 else int(self.keep)
        if not 0 < kept < full:
            what = "keeps none" if kept < 1 else "trains none"
            raise PlanError(f"OSF: keep={self.keep} {what} of the {full} directions", where=site.path, fix=f"Keep 1 to {full - 1}, or leave it out of `at`")
        return full - kept

    def part(self, site: Site, build: Build) -> Part:
        return OSFPart(site, build, self)


class Along(torch.autograd.Function):
    """p itself (n, k), whose gradient is projected on the span of the orthonormal `basis` (n, m), or, not `within`, off it."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, basis: Tensor, within: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.within = within
        return fresh(p.view_as(p))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (basis,) = ctx.saved_tensors
        along = basis @ (basis.mT @ grads[0])
        return along if ctx.within else grads[0] - along, None, None


class OSFPart(LowRankPart):
    U0: Tensor
    S0: Tensor
    V0: Tensor
    H: Tensor | None

    def __init__(self, site: Site, build: Build, m: OSF) -> None:
        super().__init__(site, build)
        k, new, front = m.trained(site), like(build, site), lead(site)
        if build.blank:
            full = min(site.out, site.inp)
            u, s, v = (torch.empty(*front, *shape, **new) for shape in ((site.out, full), (full,), (full, site.inp)))
        else:
            u, s, v = (t.to(new["dtype"]) for t in svd(wide(self.weight()), min(site.out, site.inp), None))
        for name, value in triplets(u, s, v, k).items():
            self.frozen(name, value)
        for name in "USV":
            self.register_parameter(name, nn.Parameter(getattr(self, f"{name}0").clone()))

    def pair(self) -> tuple[Tensor, Tensor]:
        # where U (or V) is square, 1 - U_h U_hᵀ is U_0 U_0ᵀ; H is the other's leading part
        left, right = (self.H, self.V0.mT) if self.site.out > self.site.inp else (self.U0, self.H)
        u = Along.apply(self.U, self.U0 if left is None else left, self.site.out <= self.site.inp)
        v = Along.apply(self.V.mT, self.V0.mT if right is None else right, self.site.out >= self.site.inp).mT  # type: ignore[union-attr]
        # in one product, so that what cancels does so in the accumulator
        return torch.cat([v, self.V0], -2), torch.cat([u * self.S.unsqueeze(-2), -self.U0 * self.S0.unsqueeze(-2)], -1)

    def scale_by(self, c: float) -> bool:
        return self._scaled(c, "S", "S0")


def triplets(u: Tensor, s: Tensor, v: Tensor, k: int) -> dict[str, Tensor | None]:
    """The k minor triplets of an SVD, and H, the leading vectors on the side that has fewer of them than features."""
    n = s.shape[-1] - k
    high = u[..., :n] if u.shape[-2] > v.shape[-1] else v[..., :n, :].mT if u.shape[-2] < v.shape[-1] else None
    minor = {"U0": u[..., n:], "S0": s[..., n:], "V0": v[..., n:, :], "H": high}
    return {name: None if t is None else t.contiguous() for name, t in minor.items()}
