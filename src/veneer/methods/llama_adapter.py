"""LLaMA-Adapter: prompts in attention, attended to apart and faded in from zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..code import own_class
from ..ops.maps import map_of, take
from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import KVPart


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """LLaMA-Adapter (Zhang et al., ICLR 2024, arXiv 2303.16199).

        out = attn(q; K, V) + tanh(g) · softmax(q (P W_k)ᵀ · scale) (P W_v)      P (n, d), g one number a head

    P goes through the layer's own frozen key and value projections and takes no position; its softmax is apart from the
    sequence's, and g is 0 at the start, so the base is left as it is until g has learnt otherwise.

    length    n; 10 by default (the paper's)
    at        'attn@-30:' by default: the topmost 30 layers (the paper's, on 32)
    per_head  g is one number for each head (True, the default and the authors' code), or one for the layer (False, as in
              Hugging Face PEFT, which leaves out the tanh as well)
    init_std  of P; 0.02 by default

    Parameters: n d + heads a layer (1.2 million on LLaMA 7B). Raises: PlanError.
    """

    name = "llama-adapter"
    family = "additive"
    ports = ("kv",)
    paper = "arXiv 2303.16199"
    default_at = "attn@-30:"

    length: int = 10
    per_head: bool = True
    init_std: float = 0.02
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(length=self.length)
        self._bool(per_head=self.per_head)
        self._finite(init_std=self.init_std)
        if self.init_std <= 0:
            raise self._fail(f"init_std must be positive, not {self.init_std!r}")
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        maps = {(s.tower, s.layer, s.role): s for s in sites("all", "weight", "")}
        for site in sites(self.at, "kv", self.default_at):
            own = [maps.get((site.tower, site.layer, f"{site.role}.{k}")) for k in ("q", "k", "v")]
            if None in own:
                raise self._fail(f"the projections of {site.path} cannot be told apart", "Leave it out, or use vn.Prefix, which needs none")
            yield site, LlamaAdapterPart(site, build, self, *own)  # type: ignore[arg-type]


class LlamaAdapterPart(KVPart):
    apart = True
    projections: Any

    def __init__(self, site: Site, build: Build, m: LlamaAdapter, q: Site, k: Site, v: Site) -> None:
        super().__init__(site)
        new = like(build, site)
        self.prompt = nn.Parameter(torch.empty(m.length, k.inp, **new).normal_(std=m.init_std))
        self.g = nn.Parameter(torch.zeros(q.out // site.head_dim if m.per_head else 1, **new))
        self.heads = site.heads
        # plain references: the base's modules are not the part's own
        self.__dict__["projections"] = [(module_at(build.model, s.path), s, map_of(s, module_at(build.model, s.path))) for s in (k, v)]

    def keys_values(self) -> tuple[Tensor, Tensor]:
        k, v = (project(self.prompt, *p).unflatten(-1, (self.heads, -1)).transpose(0, 1) for p in self.projections)
        return k, v

    def strength(self) -> Tensor:
        return torch.tanh(self.g)


def project(x: Tensor, module: Any, site: Site, m: Any) -> Tensor:
    """What the base's map at `site` makes of x (n, d), without what is attached to it."""
    p = module._parameters.get(site.tensor or "weight")
    plain = p is not None and p.is_floating_point()
    x = x.to(p.dtype) if plain else x
    if site.kind == "tensor":
        b = module._parameters.get(site.tensor.replace("weight", "bias"))
        y = nn.functional.linear(x, m.canonical(p.detach()))
        return y if b is None else y + take(b.detach(), site.slice, 0)
    return take(own_class(module).forward(module, x), site.slice)  # type: ignore[attr-defined]
