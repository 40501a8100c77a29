"""Maps: how a weight-like module applies a matrix, so that a method is written once for all of them.

In its canonical form every map is y = W x + b with W of shape (out, in): a Linear's weight; a Conv1D's transposed; a
convolution's as (out, in/groups * kernel); an embedding's transposed, with x one-hot; experts have a leading E.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..code import own_class
from ..sites import Site, Slice


def take(y: Tensor, s: Slice | None, dim: int = -1) -> Tensor:
    """The part of `y` that `s` covers along `dim`."""
    if s is None:
        return y
    if s.groups == 1:
        return y.narrow(dim, s.start, s.stop - s.start)
    dim = dim % y.dim()
    return y.unflatten(dim, (s.groups, s.stride)).narrow(dim + 1, s.start, s.stop - s.start).flatten(dim, dim + 1)


def place(d: Tensor, s: Slice | None, dim: int = -1) -> Tensor:
    """`d` where `s` lies along `dim`, with zeros elsewhere: the transpose of `take`."""
    if s is None:
        return d
    dim = dim % d.dim()
    d = d.unflatten(dim, (s.groups, s.stop - s.start))
    pad = [0, 0] * (d.dim() - 2 - dim) + [s.start, s.stride - s.stop]
    return F.pad(d, pad).flatten(dim, dim + 1)


class Map:
    """The canonical view of one weight. `module` is read for strides and the like, never for its weight.

    out_dim   the dimension of y that holds the output features
    plain     x holds features in its last dimension and y = W x is one product, so W may be applied by its factors
    looked_up x holds numbers of columns, which are looked up
    """

    out_dim = -1
    plain = True
    looked_up = False

    def __init__(self, site: Site, module: Any) -> None:
        self.slice = site.slice
        # the weight is read by other code than this module's own call y = Wx + b
        self.read_by_others = site.kind in ("tensor", "experts") or bool(site.enter)
        self.out, self.inp, self.experts = site.out, site.inp, site.experts

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        """W x without a bias, for a canonical W (any number of rows)."""
        return F.linear(x, w)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """z = A x for A (r, in): features in `out_dim`."""
        return self.apply(x, a)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        """B z for B (out, r) and z as `down` gives it."""
        return F.linear(z, b)

    def features(self, v: Tensor, y: Tensor) -> Tensor:
        """The vector v (features) shaped so that it multiplies y along `out_dim`."""
        return v

    def canonical(self, w: Tensor) -> Tensor:
        """The stored weight as (out, in), restricted to the slice."""
        return take(w, self.slice, 0)

    def stored(self, d: Tensor, w: Tensor) -> Tensor:
        """A canonical dW in the stored weight's own layout and shape (zeros outside the slice)."""
        return place(d, self.slice, 0)


class Transposed(Map):
    """HF Conv1D: the weight is stored (in, out)."""

    def canonical(self, w: Tensor) -> Tensor:
        return take(w, self.slice, 1).t()

    def stored(self, d: Tensor, w: Tensor) -> Tensor:
        return place(d.t(), self.slice, 1)


class Conv(Map):
    """Conv1d/2d/3d: W is (out, in/groups * kernel); features lie in dimension 1."""

    out_dim = 1
    plain = False

    def __init__(self, site: Site, module: Any) -> None:
        super().__init__(site, module)
        self.kernel = tuple(module.kernel_size)
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.groups, self.padding_mode = module.groups, module.padding_mode
        self.reversed_padding = getattr(module, "_reversed_padding_repeated_twice", None)
        self.conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return self._conv(x, w.reshape(w.shape[0], -1, *self.kernel), self.groups)

    def _conv(self, x: Tensor, w: Tensor, groups: int) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.reversed_padding, mode=self.padding_mode), 0  # type: ignore[arg-type]
        return self.conv(x, w, None, self.stride, padding, self.dilation, groups)  # type: ignore[arg-type]

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        a = a.reshape(a.shape[0], -1, *self.kernel)
        if self.groups == 1:
            return self._conv(x, a, 1)
        # every group has the same A: r features a group, laid out group by group
        return self._conv(x, a.repeat(self.groups, *[1] * (a.dim() - 1)), self.groups)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return self.conv(z, b.reshape(*b.shape, *[1] * len(self.kernel)), None, 1, 0, 1, self.groups)

    def features(self, v: Tensor, y: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * len(self.kernel))

    def canonical(self, w: Tensor) -> Tensor:
        return w.flatten(1)

    def stored(self, d: Tensor, w: Tensor) -> Tensor:
        return d.reshape(w.shape)


class Embedding(Map):
    """x holds ids; W is (d, V), the transpose of what is stored."""

    plain = False
    looked_up = True

    def __init__(self, site: Site, module: Any) -> None:
        super().__init__(site, module)
        # Embeddings that scale their output (Gemma) scale the deviation too; it may be a tensor buffer there
        scale = getattr(module, "embed_scale", None)
        self.scale = float(scale) if scale is not None and not getattr(scale, "is_meta", False) else 1.0
        # tables of positions and the like, which are called with something else than ids
        self.read_by_others |= scale is None and own_class(module).forward is not torch.nn.Embedding.forward  # type: ignore[attr-defined]

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return self.looked(x, w.t())

    def looked(self, x: Tensor, table: Tensor) -> Tensor:
        """Rows of `table` (V, d), scaled as the module scales its own."""
        return F.embedding(x, table) * self.scale if self.scale != 1.0 else F.embedding(x, table)

    def canonical(self, w: Tensor) -> Tensor:
        return w.t()

    def stored(self, d: Tensor, w: Tensor) -> Tensor:
        return d.t()


class Experts(Map):
    """A 3-D parameter, E x out x in (or E x in x out where the site says `transposed`)."""

    plain = False

    def __init__(self, site: Site, module: Any) -> None:
        super().__init__(site, module)
        self.transposed = site.transposed

    def canonical(self, w: Tensor) -> Tensor:
        return take(w, self.slice, 2).transpose(1, 2) if self.transposed else take(w, self.slice, 1)

    def stored(self, d: Tensor, w: Tensor) -> Tensor:
        return place(d.transpose(1, 2), self.slice, 2) if self.transposed else place(d, self.slice, 1)


KINDS: dict[str, type[Map]] = {
    "linear": Map,
    "tensor": Map,
    "transposed": Transposed,
    "conv": Conv,
    "embedding": Embedding,
    "experts": Experts,
}


def map_of(site: Site, module: Any) -> Map:
    return KINDS[site.kind](site, module)


def tokens_last(x: Tensor, channels: int) -> Tensor:
    """x as (B, tokens, channels), for means over tokens: images (B, C, *space) and vectors (B, C) too."""
    if x.dim() >= 3 and x.shape[-1] == channels:
        return x.flatten(1, -2)
    if x.dim() >= 3 and x.shape[1] == channels:
        return x.flatten(2).transpose(1, 2)
    return x.reshape(x.shape[0], -1, channels) if x.dim() > 1 else torch.atleast_2d(x).unsqueeze(1)
