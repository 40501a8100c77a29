"""Cartridges: a trained key/value cache that stands for a long text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build
from .cached import Cached
from .part import Part
from .prefix import Prefix, PrefixPart


@dataclass(frozen=True)
class Cartridge(Cached):
    """Cartridges (Eyuboglu et al., 2025, arXiv 2506.06266): a corpus as n keys and values in every layer.

        out = attn(q; [P_K; K], [P_V; V]),   of P_K, P_V (n, heads_kv · head_dim) the first `sink` rows are not trained

    length     n; 10 by default, as for vn.Prefix (the paper: 128 to 8192)
    sink       rows that stay as they start, which attention falls back on (its sink); 1 by default (the paper's)
    start      'random' (N(0, init_std²); default, as in Hugging Face PEFT), or 'data': what the base keeps of the first n
               tokens of the first row of the batches given to vn.attach (the paper's choice). It needs positions
    init_std   1 by default, as in PEFT
    positions  True (default): the cartridge takes the first n positions, as a cache does; False: it takes none
    at         'attn' by default: every self-attention

    The paper trains it by self-study: on conversations about the text that the base itself makes up with the text in its
    context, towards the base's own answers (distillation). Not the identity at the start; a gate scales it as a prefix.
    Parameters: 2 (n - sink) d a layer. Raises: PlanError, SiteError; CapabilityError where the base keeps no cache.
    """

    name = "cartridge"
    family = "soft prompt"
    ports = ("kv",)
    paper = "arXiv 2506.06266"
    identity_at_init = False
    default_at = "attn"
    rate = (5e-3, "as vn.Prefix")

    length: int = 10
    sink: int = 1
    start: str = "random"
    init_std: float = 1.0
    positions: bool = True
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(length=self.length)
        self._count(sink=self.sink)
        self._one_of(("random", "data"), start=self.start)
        self._finite(init_std=self.init_std)
        self._bool(positions=self.positions)
        if self.sink >= self.length:
            raise self._fail(f"sink={self.sink} of {self.length} rows leaves none to train", f"Use length={self.sink + 1} or more")
        if self.init_std < 0:
            raise self._fail(f"init_std must not be negative, as {self.init_std!r} is")
        if self.start == "data" and not self.positions:
            raise self._fail("start='data' is a text that stands at the first positions, and positions=False gives it none", "Leave positions out")
        self._pattern()
        object.__setattr__(self, "needs_data", self.start == "data")

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        made = list(super().parts(sites, build))
        own = [p for _, p in made if isinstance(p, CartridgePart)]
        if self.start == "data" and not build.blank:
            for part, (k, v) in zip(own, build.data("Cartridge(start='data')").cache([p.site for p in own], self.length), strict=True):
                part.begin(k.transpose(0, 1).flatten(1), v.transpose(0, 1).flatten(1))
        yield from made

    def part(self, site: Site, build: Build) -> Part:
        return CartridgePart(site, build, self)


class CartridgePart(PrefixPart):
    def __init__(self, site: Site, build: Build, m: Cartridge) -> None:
        super().__init__(site, build, Prefix(m.length, init_std=m.init_std, positions=m.positions))
        for name in ("keys", "values"):
            whole = getattr(self, name).detach()
            self.frozen(f"first_{name}", whole[: m.sink].clone())
            self.register_parameter(name, nn.Parameter(whole[m.sink :].clone()))

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Start from these, (n, heads · head_dim) each."""
        with torch.no_grad():
            for name, whole in (("keys", keys), ("values", values)):
                first = getattr(self, f"first_{name}")
                first.copy_(whole[: len(first)])
                getattr(self, name).copy_(whole[len(first) :])

    def pair(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.first_keys, self.keys]), torch.cat([self.first_values, self.values])
