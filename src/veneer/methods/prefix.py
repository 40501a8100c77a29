"""Prefix tuning: learnt keys and values that every query may attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.positions import rotation
from ..sites import Site
from .base import Build
from .cached import Cached
from .part import Part, like, module_at
from .parts import KVPart


@dataclass(frozen=True)
class Prefix(Cached):
    """Prefix tuning (Li & Liang, ACL 2021, arXiv 2101.00190); in every layer also P-tuning v2 (Liu et al. 2022).

        out = attn(q; [P_K; K], [P_V; V]) = (1 - λ) · attn(q; K, V) + λ · attn(q; P_K, P_V)

    λ is the share of the softmax's mass that falls on the prefix. P_K and P_V are (n, heads_kv · head_dim).

    length          n, 10 by default (UniPELT's; the paper uses 5 to 200)
    at              'attn' (default: every self-attention), 'cross', 'decoder/attn', …
    reparameterize  width of the MLP through which the paper trains: P = W2 tanh(W1 E), E (n, d), one W1, W2 a layer.
                    It is folded away when saving; None (default) trains P itself
    init_std        0.02: P ~ N(0, 0.02²); not the identity at the start, since even keys of zero draw attention
    positions       True: the prefix takes the first n positions and the sequence starts at n, as in Hugging Face PEFT,
                    where it is a cache. False (default): it takes none

    A gate scales the deviation λ · (attn_P - attn): see vn.gated. Parameters: 2 n d a layer (184,320 on BERT-base with
    n = 10). Raises: PlanError, SiteError.
    """

    name = "prefix"
    family = "soft prompt"
    ports = ("kv",)
    paper = "arXiv 2101.00190"
    identity_at_init = False
    default_at = "attn"
    rate = (5e-3, "P-tuning v2, 5e-3 to 1e-2 without an MLP (Liu et al. 2021)")

    length: int = 10
    reparameterize: int | None = None
    init_std: float = 0.02
    positions: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(length=self.length)
        if self.reparameterize is not None:
            self._positive(reparameterize=self.reparameterize)
        self._finite(init_std=self.init_std)
        if self.init_std < 0:
            raise self._fail(f"init_std must not be negative, as {self.init_std!r} is")
        self._bool(positions=self.positions)
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        return PrefixPart(site, build, self)


class PrefixPart(KVPart):
    turn: Tensor | None  # what makes a key that is seen from i seem one that is seen from i + n

    def __init__(self, site: Site, build: Build, m: Prefix) -> None:
        super().__init__(site)
        new, width = like(build, site), site.heads * site.head_dim
        self.heads, self.length = site.heads, m.length
        turn = rotation(build.model, module_at(build.model, site.path), site.head_dim, m.length) if m.positions else None
        self.register_buffer("turn", turn, persistent=False)
        self.mlp = None
        if m.reparameterize is None:
            self.keys = nn.Parameter(torch.empty(m.length, width, **new).normal_(std=m.init_std))
            self.values = nn.Parameter(torch.empty(m.length, width, **new).normal_(std=m.init_std))
        else:
            self.start = nn.Parameter(torch.empty(m.length, width, **new).normal_())
            self.mlp = nn.Sequential(nn.Linear(width, m.reparameterize, **new), nn.Tanh(), nn.Linear(m.reparameterize, 2 * width, **new))

    def pair(self) -> tuple[Tensor, Tensor]:
        """P_K and P_V, (n, heads · head_dim)."""
        if self.mlp is None:
            return self.keys, self.values
        k, v = self.mlp(self.start).chunk(2, -1)
        return k, v

    def keys_values(self) -> tuple[Tensor, Tensor]:
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in self.pair())
        return k if self.turn is None else k @ self.turn.to(k), v

    def folded(self) -> dict[str, Tensor]:
        """The tensors to save: the MLP's result in place of the MLP."""
        if self.mlp is None:
            return {}
        k, v = self.pair()
        return {"keys": k.detach(), "values": v.detach()}

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """Take the form without an MLP, ready for saved `keys` and `values`."""
        if self.mlp is not None:
            k, v = self.pair()
            del self.start
            self.mlp = None
            self.keys, self.values = nn.Parameter(k.detach().clone()), nn.Parameter(v.detach().clone())
