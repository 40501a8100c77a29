"""Attention with prefixes, whoever computes it: attention.py is how a model's own call comes here.

For a prefix (P_K, P_V) with gate g, out = (1 - g) · attn(q; K, V) + g · attn(q; [P_K; K], [P_V; V]), which is
attn + g · λ · (attn_P - attn): off at g = 0, prefix tuning at g = 1. Several prefixes add their deviations. A part that says
`apart` is attended to through a softmax of its own instead: out = attn + strength · attn(q; P_K, P_V) (LLaMA-Adapter).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CapabilityError
from .host import Host
from .routing import cut, folds, gate_of

if TYPE_CHECKING:
    from .methods.parts import KVPart

Attend = Callable[[Tensor, Tensor, Tensor, Any, Any], Any]


def blend(host: Host, parts: list[KVPart], q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, attend: Attend, time: int) -> Any:
    """Attention with the kv parts. `attend(q, k, v, mask, bias)` gives the model's own attention; its output has the
    queries in dimension `time` (1: (B, T, H, d); 2: (B, H, T, d))."""
    apart = [p for p in parts if p.apart]
    inside = [p for p in parts if not p.apart]
    y = _inside(host, inside, q, k, v, mask, bias, attend, time) if inside else attend(q, k, v, mask, bias)
    if not apart:
        return y
    total, rest = y if isinstance(y, tuple) else (y, None)
    for part in apart:
        total = _apart(host, part, q, k, total, getattr(attend, "scale", None), time)
    return (total, rest) if isinstance(y, tuple) else total


def _apart(host: Host, part: KVPart, q: Tensor, k: Tensor, total: Tensor, scale: float | None, time: int) -> Tensor:
    """total + strength · softmax(q P_K^T) P_V: every query sees the prompt through a softmax of its own."""
    frame, x = host.state.frame, _take_x(part)
    x = x.transpose(0, 1) if host.batch_dim == 1 and x is not None else x
    routing, pad, n = frame.routing, frame.mask, q.shape[0]
    rows = routing.rows(part.adapter, n, q.device) if routing is not None else None
    if rows is not None:
        if rows.numel() == 0:
            return total
        q, k, x, pad = (_rows(t, n, rows) for t in (q, k, x, pad))
    pk, pv = _pair(part, k, None)
    if pk.shape[1] != q.shape[1]:
        pk, pv = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (pk, pv))
    scores = (q @ pk.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    d = torch.softmax(scores, -1).to(pv.dtype) @ pv
    strength = part.strength().to(d.dtype)
    d = d * (strength.reshape(-1, 1, 1))
    d = d.transpose(1, 2) if time == 1 else d
    if part.gate is not None:
        d = d * _over_heads(gate_of(part, x, frame, pad, 0, folds(q.shape[0], frame)), d, time)
    return total + d if rows is None else total.index_add(0, rows, d.to(total.dtype))


def _inside(host: Host, parts: list[KVPart], q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, attend: Attend, time: int) -> Any:
    """Attention with prefixes before its own keys and values."""
    xs = [_take_x(p) for p in parts]
    if host.batch_dim == 1:
        xs = [x if x is None else x.transpose(0, 1) for x in xs]
    return _blend(host, parts, xs, q, k, v, mask, bias, attend, time)


def _in_runs(host: Host, runs: Any, parts: list[KVPart], xs: list[Any], args: Any, attend: Attend, time: int) -> Any:
    """`_blend` in each run of rows by itself, joined again."""
    frame, n = host.state.frame, args[0].shape[0]
    cuts = [cut(t, runs, frame.routing.size, n, 0) for t in args]
    inputs = [cut(x, runs, frame.routing.size, n, 0) for x in xs]
    outs = []
    try:
        for i, run in enumerate(runs):
            own = [j for j, p in enumerate(parts) if p.adapter in run.names]
            host.state.frame = frame.routing.frame(frame, run)
            piece = [c[i] for c in cuts]
            outs.append(_blend(host, [parts[j] for j in own], [inputs[j][i] for j in own], *piece, attend, time) if own else attend(*piece))
    finally:
        host.state.frame = frame
    if not isinstance(outs[0], tuple):
        return torch.cat(outs)
    rest = [o[1] for o in outs]
    return torch.cat([o[0] for o in outs]), torch.cat(rest) if all(isinstance(r, Tensor) for r in rest) else None


def _blend(host: Host, parts: list[KVPart], xs: list[Any], q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, attend: Attend, time: int) -> Any:
    frame = host.state.frame
    routing = frame.routing
    if routing is not None:
        runs = routing.runs(p.adapter for p in parts) if q.shape[0] % routing.size == 0 else None
        if runs is not None and len(runs) != 1:
            return _in_runs(host, runs, parts, xs, (q, k, v, mask, bias), attend, time)
        if runs is not None:  # all rows use the same
            here = [j for j, p in enumerate(parts) if p.adapter in runs[0].names]
            parts, xs, routing = [parts[j] for j in here], [xs[j] for j in here], None
    if not parts:
        return attend(q, k, v, mask, bias)
    simple = len(parts) == 1 and routing is None and (parts[0].gate is None or parts[0].published)
    if simple:
        pk, pv = _pair(parts[0], k, None if parts[0].gate is None else gate_of(parts[0], xs[0], frame, frame.mask, 0, folds(q.shape[0], frame)))
        return _with_prefix(q, k, v, mask, bias, pk, pv, attend, time)
    base = attend(q, k, v, mask, bias)
    out, rest = base if isinstance(base, tuple) else (base, None)
    total = out
    for part, x in zip(parts, xs, strict=True):
        rows = routing.rows(part.adapter, q.shape[0], q.device) if routing is not None else None
        args, m, base_out, pad = (q, k, v, mask, bias), x, out, frame.mask
        if rows is not None:
            if rows.numel() == 0:
                continue
            args = tuple(_rows(t, q.shape[0], rows) for t in args)
            m, base_out, pad = (_rows(t, q.shape[0], rows) for t in (x, out, pad))
        g = None if part.gate is None else gate_of(part, m, frame, pad, 0, folds(q.shape[0], frame))
        pk, pv = _pair(part, args[1], g if part.published else None)
        with_prefix = _with_prefix(*args, pk, pv, attend, time)
        d = (with_prefix[0] if isinstance(with_prefix, tuple) else with_prefix) - base_out
        if g is not None and not part.published:
            d = d * _over_heads(g, d, time)
        total = total + d if rows is None else total.index_add(0, rows, d.to(total.dtype))
    return (total, rest) if isinstance(base, tuple) else total


def _take_x(part: KVPart) -> Any:
    if part.cell is None:
        return None
    x, part.cell.x = part.cell.x, None
    return x


def _rows(t: Any, n: int, rows: Tensor) -> Any:
    return t.index_select(0, rows) if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t


def _over_heads(g: Tensor, out: Tensor, time: int) -> Tensor:
    if g.dim() == 0:
        return g
    if g.dim() == 1:
        return g[:, None, None, None]
    return g[:, :, None, None] if time == 1 else g[:, None, :, None]


def _pair(part: KVPart, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """P_K and P_V as (B, heads of k, n, head_dim), in k's dtype, scaled by g (B,) if given."""
    out = []
    for p in part.keys_values():
        p = p.to(k.dtype)
        if p.shape[0] != k.shape[1]:  # the model repeated its key/value heads already
            p = p.repeat_interleave(k.shape[1] // p.shape[0], 0)
        p = p[None].expand(k.shape[0], -1, -1, -1)
        if g is not None:
            g1 = g[:, -1] if g.dim() == 2 else g
            p = p * (g1 if g1.dim() == 0 else g1[:, None, None, None])
        out.append(p)
    return out[0], out[1]


def _with_prefix(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, pk: Tensor, pv: Tensor, attend: Attend, time: int) -> Any:
    n, queries = pk.shape[2], q.shape[2]
    causal = mask is None and getattr(attend, "causal", False) and queries > 1
    if causal:
        # Dummy queries before the real ones keep the causal square aligned without a materialised mask; the prefix
        # lies before every real query, and what the dummies compute is dropped.
        if k.shape[2] > queries:  # an empty static cache
            k, v = k[:, :, :queries], v[:, :, :queries]
            bias = bias[..., :queries] if bias is not None else None
        q = torch.cat([q.new_zeros(q.shape[0], q.shape[1], n, q.shape[3]), q], 2)
        bias = F.pad(bias, (n, 0, n, 0)) if bias is not None else None
    else:
        mask = _wider(mask, n, k.shape[2])
        bias = F.pad(bias, (n, 0)) if bias is not None else None
    out = attend(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), mask, bias)
    o, weights = out if isinstance(out, tuple) else (out, None)
    if causal:
        o = o.narrow(time, n, queries)
        weights = weights[..., n:, :] if weights is not None else None
    weights = weights[..., n:] if weights is not None else None
    return (o, weights) if isinstance(out, tuple) else o


def _wider(mask: Any, n: int, length: int) -> Any:
    """`mask` with n columns before it that every query sees."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise CapabilityError(
            f"a prefix cannot be put before a {type(mask).__name__} mask",
            fix="Use attn_implementation 'sdpa', 'eager' or 'flash_attention_2'",
        )
    if mask.dim() == 2 and not mask.is_floating_point() and mask.dtype != torch.bool:
        return F.pad(mask, (n, 0), value=1)
    if mask.shape[-1] == 1 and length > 1:
        return mask
    mask = mask[..., :length]
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)
