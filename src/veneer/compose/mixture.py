"""Mixtures: a learnt router chooses, token by token, among plans that act at the same sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, did_you_mean
from ..plan import Gate, Plan, check_plan, finite, short, ungated, whole
from .gate import Gate as Scale

if TYPE_CHECKING:
    from ..methods.part import Part
    from ..sites import Site

PER = ("token", "example")


@dataclass(frozen=True)
class Mixture(Gate):
    """Plans among which a router chooses; made by `vn.mixture`."""

    members: tuple[Plan, ...]
    top_k: int | None = None
    per: str = "token"
    balance: float = 0.01

    def inside(self) -> tuple[Plan, ...]:
        return self.members

    def rebuild(self, members: list[Plan]) -> Plan:
        return mixture(*members, top_k=self.top_k, per=self.per, balance=self.balance)

    def make(self, site: Site, part: Part, width: int, new: dict[str, Any], member: int, shared: dict[Any, Any]) -> Scale:
        key = (id(self), part.stage, *place_of(part))
        if key not in shared:
            shared[key] = Router(width, len(self.members), self.top_k, new)
        per = "example" if part.acts == "embed" else self.per
        return Routed(shared[key], member, per=per, causal=site.causal and part.acts != "embed", balance=self.balance)

    def check(self, parts: list[Part]) -> None:
        same_sites(self, parts, len(self.members), "mixture")

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"mixture": [m.to_dict() for m in self.members]}
        for key in ("top_k", "per", "balance"):
            if getattr(self, key) != getattr(type(self), key):
                out[key] = getattr(self, key)
        return out

    def __str__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.to_dict().items() if k != "mixture")
        return f"mixture({', '.join(map(str, self.members))}{options})"

    __repr__ = __str__


def place_of(part: Part) -> tuple[Any, ...]:
    """What two parts have in common that act at the same place."""
    s = part.site
    return s.path, s.port, s.tensor, s.slice


def same_sites(plan: Gate, parts: list[Part], count: int, who: str) -> None:
    """Raise PlanError unless every member of `plan` acts wherever one of them does."""
    found: dict[Any, set[int]] = {}
    for p in parts:
        found.setdefault(place_of(p), set()).add(p.gate.member)  # type: ignore[union-attr]
    for (path, *_), members in found.items():
        if len(members) < count:
            missing = next(i for i in range(count) if i not in members)
            raise PlanError(
                f"{who}: its members act at the same sites, and number {missing + 1} of {count} does not act here", where=path,
                fix="Give all members the same at=…, or use vn.gated, which gates every part by itself",
            )  # fmt: skip


def mixture(*plans: Plan, experts: int | None = None, top_k: int | None = None, per: str = "token", balance: float = 0.01) -> Plan:
    """A mixture of experts: a router at every site weighs plans that act there (Shazeer et al., ICLR 2017,
    arXiv 1701.06538; for LoRA: Zadouri et al. 2023, arXiv 2309.05444).

        h' = h + Σ_k g_k δ_k(x, h),   g = softmax(R x),   R (K, d) ~ N(0, 0.02²)

    with x what the experts read there, for each token.

    plans    the experts, of any methods that act at the same sites; trained ones too (vn.use)
    experts  with one plan: how many copies of it, each with its own start
    top_k    only the k largest weights count, scaled to sum to 1 (with k = 1 the weight as it is, as Fedus et al.);
             None (default): all
    per      'token' (default), or 'example': the mean weights over an example's real tokens (in a causal tower, those so far)
    balance  α of the balance loss α K Σ_k f_k p_k, with f_k the share of tokens whose first choice is k, and p_k the mean
             weight (Fedus et al., JMLR 2022, arXiv 2101.03961, and its 0.01); in vn.penalty, so our trainer adds it

    vn.gates shows how much each expert is used. Parameters: the experts', and K d a site.
    Raises: PlanError for fewer than two experts, experts at different sites, or options out of range.
    """
    for p in plans:
        check_plan(p, "mixture", "Make methods first: vn.mixture(vn.LoRA(4), vn.LoRA(4))")
    if experts is not None:
        if len(plans) != 1 or not whole(experts, 2, 1024):
            raise PlanError(f"mixture: experts={short(experts)} copies one plan, 2 times or more", fix="For example vn.mixture(vn.LoRA(4), experts=4)")
        plans = plans * experts
    if len(plans) < 2:
        raise PlanError("mixture: there is one expert", fix="Give several plans, or experts=4 with one")
    if top_k is not None and not whole(top_k, 1, len(plans)):
        raise PlanError(f"mixture: top_k must be from 1 to {len(plans)}, not {short(top_k)}")
    if per not in PER:
        raise PlanError(f"mixture: per is {short(per)}", fix=did_you_mean(str(per), PER))
    if not finite(balance) or balance < 0:
        raise PlanError(f"mixture: balance must be a number of at least 0, not {short(balance)}")
    for p in plans:
        ungated(p, "mixture")
    return Mixture(tuple(plans), top_k, per, float(balance))


class Router(nn.Module):
    """Weights over K experts for every token."""

    def __init__(self, width: int, count: int, top_k: int | None, new: dict[str, Any]) -> None:
        super().__init__()
        self.top_k = top_k
        self.uneven: Tensor | None = None  # the balance loss of the last call in training
        self.weight = nn.Parameter(torch.empty(count, width, **new).normal_(std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For x (B, T, d): the weights that count and all of them, (B, T, K) each, in fp32."""
        p = torch.softmax(nn.functional.linear(x, self.weight.to(x.dtype)).float(), -1)
        if self.top_k is None:
            return p, p
        values, index = p.topk(self.top_k, -1)
        if self.top_k > 1:  # one weight scaled to 1 would teach the router nothing
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, index, values), p


class Routed(Scale):
    """The gate of one expert: its weight in the router's answer."""

    def __init__(self, router: Router, member: int, *, per: str, causal: bool, balance: float) -> None:
        nn.Module.__init__(self)
        self.per, self.temperature, self.causal, self.width = per, 1.0, causal, router.weight.shape[1]
        self.watch: Any = None
        self.adapter = ""
        self.router, self.member, self.balance = router, member, balance

    def tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        counted, p = self.router(x)
        if self.balance and self.training and self.member == 0:  # once for all experts
            real = torch.ones_like(p[..., 0]) if mask is None else mask.to(p.dtype)
            first = (p.argmax(-1, keepdim=True) == torch.arange(p.shape[-1], device=p.device)).to(p.dtype)
            n = real.sum().clamp(min=1)
            share, weight = ((t * real[..., None]).sum((0, 1)) / n for t in (first, p))
            self.router.uneven = self.balance * p.shape[-1] * (share * weight).sum()
        return counted[..., self.member]

    def penalty(self) -> Tensor | None:
        found, self.router.uneven = self.router.uneven, None  # once, however many parts an expert has here
        return found
