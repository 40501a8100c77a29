"""Calls of a routed batch that neither autograd nor a compiler follows: what they cost is their launches and the Python between.

y_i <- y_i + (x A_eᵀ)_i B_{e,i}ᵀ      one product for all maps that share x, and one for each map, into what it returned
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Eager:
    """The stacks A (E, M r, in) and B_i (E, out_i, r) of one group, as such calls read them: laid out once, looked at by each."""

    __slots__ = ("apart", "device", "down", "downs", "dtype", "groups", "left", "rank", "size", "ups", "version", "x", "zs")

    def __init__(self, a: Tensor, ups: list[Tensor], rank: int, size: int) -> None:
        """size  rows that the route names, of which each may stand for several neighbours"""
        self.size, self.rank, self.dtype, self.device, self.groups = size, rank, a.dtype, a.device, a.shape[0]
        self.down, self.ups = a.transpose(1, 2), [b.transpose(1, 2) for b in ups]
        self.downs = list(self.down.split(rank, 2))
        self.apart = len(ups) == 1  # maps that do not share their input
        self.x: Tensor | None = None
        self.version: Any = None
        self.zs: list[Any] = []
        self.left = 0

    def takes(self, x: Tensor, y: Tensor) -> bool:
        if not x.dtype == y.dtype == self.dtype or x.device != self.device or not y.is_contiguous():
            return False
        return x.shape[0] > 0 and x.shape[0] % self.size == 0

    def add(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        """y, with what map i has for x added to it."""
        self._grouped(y).baddbmm_(self._low(i, x), self.ups[i])
        return y

    def _grouped(self, t: Tensor) -> Tensor:
        return t if t.dim() == 3 and t.shape[0] == self.groups else t.reshape(self.groups, -1, t.shape[-1])

    def _low(self, i: int, x: Tensor) -> Tensor:
        if not self.apart:
            version = None if x.is_inference() else x._version
            if self.x is x and self.version == version and self.zs[i] is not None:
                z, self.zs[i] = self.zs[i], None
                self.left -= 1
                if not self.left:
                    self.x = None
                return z
            if self.x is None:
                self.zs = list(torch.bmm(self._grouped(x), self.down).split(self.rank, 2))
                z, self.zs[i], self.left = self.zs[i], None, len(self.zs) - 1
                self.x, self.version = x, version
                return z
            self.apart, self.x, self.zs = True, None, []  # some map was not called with the input that the others had
        return torch.bmm(self._grouped(x), self.downs[i])
