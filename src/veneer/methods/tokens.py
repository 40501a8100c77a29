"""Trainable tokens: some rows of the embedding get a delta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.maps import Map
from ..plan import whole
from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import MapPart


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Rows of the token embedding, for new or special tokens (Hugging Face PEFT's TRAINABLE_TOKENS; cf. arXiv 1902.00751).

        E'(i) = E(i) + δ_i  for the tokens i of the list,   E(i) for all others

    tokens   ids of the tokens
    at       embeddings; default 'embed'. Where a head holds the same table its rows change too, and it stays tied
    tied     False: the embedding alone, as PEFT does without ensure_weight_tying

    Save n rows and not a table. δ is zero at the start. Parameters: n d, and n frozen int32 ids. Raises: PlanError for an id
    that the table does not have, or one named twice.
    """

    name = "tokens"
    family = "selective"
    ports = ("weight",)
    paper = "arXiv 1902.00751"
    mergeable = True
    default_at = "embed"
    kinds = ("embedding",)

    tokens: tuple[int, ...] = ()
    at: str | None = None
    tied: bool = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        self._bool(tied=self.tied)
        ids = self.tokens
        if not isinstance(ids, (tuple, list)) or not ids or any(not whole(i, 0) for i in ids):
            raise self._fail("tokens is a list of ids", "For example tokens=(32000, 32001)")
        if len(set(ids)) != len(ids):
            raise self._fail("a token is named twice")
        object.__setattr__(self, "tokens", tuple(ids))
        self._pattern()

    def part(self, site: Site, build: Build) -> Part:
        if max(self.tokens) >= site.inp:
            raise self._fail(f"{site.path} has {site.inp} tokens, and not {max(self.tokens)}", "Resize it first: model.resize_token_embeddings(n)")
        return TokensPart(site, build, self)


class TokensPart(MapPart):
    ids: Tensor

    def __init__(self, site: Site, build: Build, m: TrainableTokens) -> None:
        super().__init__(site, build)
        new = like(build, site)
        self.frozen("ids", torch.tensor(sorted(m.tokens), dtype=torch.int32, device=new["device"]))
        self.delta = nn.Parameter(torch.zeros(len(m.tokens), site.out, **new))

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        # the place of each token in the list, by bisection: a step costs the tokens it sees, not the vocabulary
        ids = self.ids.to(x.dtype)
        at = torch.searchsorted(ids, x.contiguous()).clamp(max=len(ids) - 1)
        return self.map.looked(at, self.cast(self.delta, h)) * (ids[at] == x).unsqueeze(-1)  # type: ignore[attr-defined]

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        return y.index_copy(-1, self.ids.long(), nn.functional.linear(x, self.cast(self.delta, h)).to(h.dtype))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(w).index_copy(1, self.ids.long(), self.delta.t().to(w.dtype)), None

    def flaw(self) -> str:
        n = self.map.inp
        ok = self.ids.is_meta or (bool((self.ids[1:] > self.ids[:-1]).all()) and 0 <= int(self.ids[0]) and int(self.ids[-1]) < n)
        return "" if ok else f"its tokens are not among the {n} of the table, each once"

    def scale_by(self, c: float) -> bool:
        with torch.no_grad():
            self.delta.mul_(c)
        return True
