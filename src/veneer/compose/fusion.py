"""Fusion: attention over the deviations of several trained adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..plan import Gate, Plan, check_plan, ungated
from .gate import Gate as Scale
from .mixture import place_of, same_sites

if TYPE_CHECKING:
    from ..methods.part import Part
    from ..sites import Site


@dataclass(frozen=True)
class Fusion(Gate):
    """Plans over whose deviations attention is learnt; made by `vn.fuse`."""

    members: tuple[Plan, ...]
    settles = False

    def inside(self) -> tuple[Plan, ...]:
        return self.members

    def rebuild(self, members: list[Plan]) -> Plan:
        return fuse(*members)

    def make(self, site: Site, part: Part, width: int, new: dict[str, Any], member: int, shared: dict[Any, Any]) -> Scale:
        if part.acts != "output":
            raise PlanError(
                f"fuse: {part.method_name} does not add to a state that leaves a module, so there is nothing to attend over", where=site.path,
                fix="Fuse bottlenecks, LoRA and the like; gate others with vn.gated",
            )  # fmt: skip
        key = (id(self), part.stage, *place_of(part))
        if key not in shared:
            shared[key] = Attend(site.out if site.port == "weight" else site.width, new)
        return Fused(shared[key], member)

    def check(self, parts: list[Part]) -> None:
        same_sites(self, parts, len(self.members), "fuse")

    def to_dict(self) -> dict[str, Any]:
        return {"fuse": [m.to_dict() for m in self.members]}

    def __str__(self) -> str:
        return f"fuse({', '.join(map(str, self.members))})"

    __repr__ = __str__


def fuse(*plans: Plan) -> Plan:
    """AdapterFusion (Pfeiffer et al., EACL 2021, arXiv 2005.00247): attention over the outputs of trained adapters.

        h' = h + Σ_k s_k V δ_k,   s = softmax_k( (Q h) · (K δ_k) / √d ),   Q, K, V (d, d)

    for each token, with δ_k the deviation of adapter k and h the state that they all change. Q and K start at N(0, 0.02²)
    and V at the identity, so that the start is about the mean of the adapters. (The paper attends over h + δ_k and has no
    √d; over the deviations, adapters that do nothing change nothing.)

    plans  trained adapters, as vn.use('sst2'), which are held while Q, K and V learn; plans of any methods that add to
           the state that leaves a module, and act at the same sites

    vn.gates shows the attention. Parameters: 3 d² a site. Raises: PlanError.
    """
    for p in plans:
        check_plan(p, "fuse", "Name trained adapters: vn.fuse(vn.use('sst2'), vn.use('mnli'))")
    if len(plans) < 2:
        raise PlanError("fuse: there is one adapter", fix="Give several: vn.fuse(vn.use('sst2'), vn.use('mnli'))")
    for p in plans:
        ungated(p, "fuse")
    return Fusion(tuple(plans))


class Attend(nn.Module):
    """Weighs the deviations δ_k by attention from h."""

    def __init__(self, width: int, new: dict[str, Any]) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(width, width, **new).normal_(std=0.02))
        self.key = nn.Parameter(torch.empty(width, width, **new).normal_(std=0.02))
        self.value = nn.Parameter(torch.eye(width, **new))

    def forward(self, h: Tensor, deltas: list[Tensor], gates: list[Fused], mask: Tensor | None = None) -> Tensor:
        """Σ_k s_k V δ_k; states are (…, d) each."""
        d = torch.stack(deltas, -2)
        q, k = nn.functional.linear(h, self.query.to(h.dtype)), nn.functional.linear(d, self.key.to(h.dtype))
        s = torch.softmax((q.unsqueeze(-2) * k).sum(-1).float() / math.sqrt(h.shape[-1]), -1)
        for i, gate in enumerate(gates):
            if gate.watch is not None:
                gate.watch(gate.means(s[..., i].detach().flatten(1), mask))
        return nn.functional.linear((s.to(h.dtype).unsqueeze(-1) * d).sum(-2), self.value.to(h.dtype))


class Fused(Scale):
    """Marks a part whose deviation `joint` weighs together with others'."""

    def __init__(self, joint: Attend, member: int) -> None:
        nn.Module.__init__(self)
        self.per, self.temperature, self.causal, self.width = "token", 1.0, False, joint.query.shape[0]
        self.watch: Any = None
        self.adapter = ""
        self.attend, self.member = joint, member

    @property
    def joint(self) -> Attend:
        return self.attend

    def forward(self, x: Tensor | None, frame: Any, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("a fused part has no gate of its own")
