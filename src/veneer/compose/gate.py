"""Gates: one learnt number that scales a part's deviation (UniPELT, made general)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.maps import tokens_last


class Gate(nn.Module):
    """g = mean over real tokens of sigmoid((w·x + b) / temperature); w from zero, b from `bias`.

    per 'example': (B,) means; in a causal tower the mean of the tokens so far, (B, T).
    per 'token': (B, T).   per 'constant': sigmoid(b / temperature), a scalar.   per 'fixed': the buffer `value`.

    Its answer has the shape that broadcasts over the state it scales. `watch` may be set to a function that is given
    every g as (B,) means, for vn.gates.
    """

    member: int | None = None  # of a mixture or a fusion
    rate: float = 1.0  # learning rate, as a multiple of the run's
    drop: float = 0.0  # how often it is 0 in training
    joint: Any = None  # what weighs the deviations of several parts together: see compose/fusion.py

    def __init__(self, width: int, *, per: str, bias: float, temperature: float, causal: bool, new: dict[str, Any]) -> None:
        super().__init__()
        self.per, self.temperature, self.causal, self.width = per, temperature, causal, width
        self.watch: Any = None
        self.adapter = ""  # the name it was attached under
        if per in ("example", "token"):
            self.weight = nn.Parameter(torch.zeros(width, **new))
        self.bias = nn.Parameter(torch.full((1,), bias, **new))  # not (): FSDP2 shards no scalars

    def forward(self, x: Tensor | None, frame: Any, mask: Tensor | None = None, part: Any = None) -> Tensor:
        """g for x (B, *tokens, d) or images (B, d, *space), as (B,), (B, T) or (); `shape_like` broadcasts it."""
        if self.per == "constant":
            g = torch.sigmoid(self.bias.squeeze(0) / self.temperature)
            if self.watch is not None:
                self.watch(g.detach().reshape(1))
            return self.dropped(g)
        assert x is not None
        x = tokens_last(x, self.width)
        dtype = x.dtype
        if mask is not None and (mask.shape[0] != x.shape[0] or mask.shape[1] != x.shape[1]):
            mask = None
        s = self.tokens(x, mask)
        if self.per == "token":
            g = s
        elif self.causal and s.shape[1] >= 1:
            g = self._running(s, frame, mask, part or self)
        elif mask is None:
            g = s.mean(1)
        else:
            m = mask.to(s.dtype)
            g = (s * m).sum(1) / m.sum(1).clamp(min=1)
        if self.watch is not None:
            self.watch(self.means(g.detach(), mask))
        return self.dropped(g).to(dtype)

    def dropped(self, g: Tensor) -> Tensor:
        """In training g or, `drop` of the time, 0, for a whole example, scaled so that the mean is g."""
        if not (self.training and self.drop):
            return g
        kept = torch.rand(g.shape[:1], device=g.device) >= self.drop
        return g * (kept.reshape(-1, *[1] * (g.dim() - 1)) if g.dim() else kept).to(g.dtype) / (1 - self.drop)

    def tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The gate of every token, (B, T) in fp32, for x (B, T, d)."""
        score = nn.functional.linear(x, self.weight.to(x.dtype)[None], self.bias.to(x.dtype)).squeeze(-1)
        return torch.sigmoid(score.float() if self.temperature == 1 else score.float() / self.temperature)

    def penalty(self) -> Tensor | None:
        """A term of the training loss, where it has one."""
        return None

    def _running(self, s: Tensor, frame: Any, mask: Tensor | None, part: Any) -> Tensor:
        """The mean of the tokens so far; sums so far are kept with the key/value cache, so decoding continues them. A part
        of a tied tensor acts at several places, each with sums of its own."""
        m = torch.ones_like(s) if mask is None else mask.to(s.dtype)
        total, count = (s * m).cumsum(1), m.cumsum(1)
        memo = getattr(frame, "memo", None)
        if memo is not None:
            before = memo.get(part)
            if before is not None and before.shape[1] == s.shape[0]:
                total, count = total + before[0][:, None], count + before[1][:, None]
            memo[part] = torch.stack((total[:, -1], count[:, -1])).detach()
        return total / count.clamp(min=1)

    def means(self, g: Tensor, mask: Tensor | None) -> Tensor:
        """g as (B,), the mean over real tokens of (B, T)."""
        if g.dim() < 2:
            return g
        if self.per == "example":
            return g[:, -1]
        if mask is None or mask.shape != g.shape:
            return g.mean(1)
        m = mask.to(g.dtype)
        return (g * m).sum(1) / m.sum(1).clamp(min=1)


def shape_like(g: Tensor, h: Tensor, width_last: bool = True) -> Tensor:
    """g as (), (B,) or (B, T), shaped to broadcast over the state h: (B, T, d), (B, d, *space) or (B, d)."""
    if g.dim() == 0:
        return g
    if g.dim() == 1:
        return g.reshape(-1, *[1] * (h.dim() - 1))
    tokens = g.shape[1]
    if width_last:
        lead = h.shape[1:-1]
        if h.dim() == 2:  # (B, d): one token each
            return g.reshape(-1, 1)
        return g.reshape(g.shape[0], *lead, 1) if _product(lead) == tokens else g.mean(1).reshape(-1, *[1] * (h.dim() - 1))
    return g.reshape(g.shape[0], 1, *h.shape[2:])


def _product(shape: Any) -> int:
    n = 1
    for s in shape:
        n *= s
    return n
