"""The ways of acting that a part may have, one class each; a method's part subclasses one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.maps import Map, map_of, take
from ..ops.weights import weight_of
from ..sites import Site
from .part import Part

if TYPE_CHECKING:
    from .base import Build


class OutputPart(Part):
    """Adds `deviation(x, h)` to the output h of a map or a block whose input is x."""

    acts = "output"

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


class MapPart(OutputPart):
    """An `OutputPart` at the weight port: `self.map` applies matrices as the base's module would."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site)
        self.map: Map = map_of(site, build.module)
        self.__dict__["module"] = build.module  # whose matrix it is: see `weight`
        if self.map.read_by_others:
            self.acts = "tensor"  # type: ignore[misc]

    def weight(self) -> Tensor:
        """The base's own canonical W (out x in, restricted to the slice), without a gradient; dequantised if need be.

        Raises: CapabilityError where the module has no matrix to be had.
        """
        return weight_of(self.module, self.site, self.map)

    def bias(self) -> Tensor | None:
        """The base's own b, of the slice, without a gradient; None where the module has none."""
        bias = getattr(self.module, "bias", None)
        return take(bias.detach(), self.site.slice) if isinstance(bias, Tensor) else None

    def bare(self, h: Tensor) -> Tensor:
        """W x, from what the base made of x: h = W x + b."""
        bias = self.bias()
        return h if bias is None else h - self.map.features(bias, h).to(h.dtype)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(dW, db) for the map's matrix w, out x in (experts: E x out x in), and bias b, in their own dtype."""
        raise NotImplementedError

    def reads_weight(self) -> bool:
        return getattr(self, "factors", None) is None

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        """dW^T x at a module whose map `m` applies the transpose of this part's own W, as an embedding does of its tied
        head's; h is what it returned so far.

        By the part's factors where it has some: (B A)^T = A^T B^T. Otherwise the whole dW is made.
        """
        factors = getattr(self, "factors", None)
        if factors is None:
            return m.apply(x, self.fold(self.weight().to(h.dtype), None)[0].t().to(h.dtype))
        a, b, s = factors(h)
        z = m.down(x, b.t())
        return m.up(z * s if s != 1 else z, a.t())

    def value(self, p: Tensor) -> Tensor:
        """p + dW, where the model reads the weight itself and no call of the map can be met; its bias stays."""
        return p + self.map.stored(self.fold(self.map.canonical(p), None)[0].to(p.dtype), p)


class DeltaPart(MapPart):
    """A `MapPart` that adds a matrix: y = (W + dW) x + b. The subclass gives `delta`, canonical, in its own dtype."""

    def delta(self) -> Tensor:
        raise NotImplementedError

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.apply(x, self.cast(self.delta(), h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.delta().to(w.dtype), None

    def reads_weight(self) -> bool:
        return False

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        return m.apply(x, self.cast(self.delta(), h).t())


class InputPart(MapPart):
    """Adds `inward(x)` to the input of a map."""

    acts = "input"

    def inward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        if not m.looked_up:
            return super().across(m, x, h)
        # what changes the input does the same to every row of W, so only the rows that are looked up are changed
        rows = m.looked(x, self.weight().to(h.dtype))
        return self.fold(rows.flatten(0, -2), None)[0].to(h.dtype).unflatten(0, x.shape)


class TensorPart(Part):
    """Gives the tensor that takes the place of the base's tensor p while the owner's module runs."""

    acts = "tensor"

    def value(self, p: Tensor) -> Tensor:
        raise NotImplementedError


class KVPart(Part):
    """Keys and values that attention sees before its own."""

    acts = "kv"
    apart: bool = False  # through a softmax of their own, scaled by strength()

    def strength(self) -> Tensor:
        """What an `apart` part's attention is multiplied by: (heads of the queries,) or (1,)."""
        raise NotImplementedError

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """K and V, each (heads, n, head_dim)."""
        raise NotImplementedError


class EmbedPart(Part):
    """Vectors put before the embedded input sequence."""

    acts = "embed"
    keep: int = 0

    def prompt(self) -> Tensor:
        """(n, d)."""
        raise NotImplementedError
