"""Prompts before the embedded sequence of a tower, cut from its output again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CapabilityError

if TYPE_CHECKING:
    from .host import Host, Recipe
    from .methods.parts import EmbedPart

CACHES = ("cache", "past_key_values", "cache_params")


def run_embed(host: Host, r: Recipe, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tower's call with the prompts of `r` put before its input."""
    assert host.signature is not None
    call = dict(zip(host.signature.parameters, args, strict=False))
    call.update(kwargs)
    if r.memory:
        _widen_memory(host, r.memory, call)
    if not r.embed:
        return forward(**call)
    site = r.embed[0].site
    x = _embedded(host, site, call)
    if x is None:
        return forward(**call)
    batch, length, device = x.shape[0], x.shape[1], x.device
    vectors, real = prompts(host, r.embed, x)
    n = vectors.shape[1]
    keep = min(p.keep for p in r.embed)
    state, before = host.state, host.state.frame
    if _past(call) > 0:
        _grow(call, "attention_mask", lambda m: _insert(m, real, 0, device))
        for key in ("position_ids", "cache_position"):
            if call.get(key) is not None:
                call[key] = call[key] + (real.sum(1, keepdim=True) if key == "position_ids" else n)
        return forward(**call)
    call[site.argument] = torch.cat([x[:, :keep], vectors, x[:, keep:]], 1)
    ids = next((k for k in ("input_ids",) if k in call), None)
    if ids is not None:
        call[ids] = None
    names = host.signature.parameters
    ragged = not bool(real.all())
    mask = call.get("attention_mask")
    if mask is None and ragged:
        if "attention_mask" not in names:
            raise CapabilityError("prompts of different lengths in one batch need an attention mask", fix="Route rows with one prompt")
        mask = torch.ones(batch, length, device=device, dtype=torch.long)
    if mask is not None:
        call["attention_mask"] = _insert(mask, real, keep, device)
    positions = call.get("position_ids")
    count = real.sum(1, keepdim=True)
    if positions is not None and positions.dim() == 2 or (ragged and "position_ids" in names):
        own = positions if positions is not None else torch.arange(length, device=device)[None]
        own = own.expand(batch, -1)
        lead = own[:, :keep]
        virtual = (real.cumsum(1) - 1).clamp(min=0) + keep
        call["position_ids"] = torch.cat([lead, virtual.to(own.dtype), own[:, keep:] + count.to(own.dtype)], 1)
    if call.get("cache_position") is not None:
        call["cache_position"] = torch.arange(length + n, device=device)
    if call.get("token_type_ids") is not None:
        t = call["token_type_ids"]
        call["token_type_ids"] = torch.cat([t[:, :keep], t[:, :1].expand(-1, n), t[:, keep:]], 1)
    two = call.get("attention_mask")
    state.frame = replace(before, mask=two if isinstance(two, Tensor) and two.dim() == 2 else None)
    try:
        out = forward(**call)
    finally:
        state.frame = before
    return out if r.embed[0].visible else strip(out, keep, n, length + n)


def prompts(host: Host, parts: list[EmbedPart], x: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts for x (B, T, d) as (B, n, d), and which of the n positions are real in each row (B, n)."""
    frame = host.state.frame
    pieces, real = [], []
    for part in parts:
        p = part.prompt().to(x.dtype)[None].expand(x.shape[0], -1, -1)
        if part.gate is not None:
            from .host import gate_of

            g = gate_of(part, x, replace(frame, memo=None), frame.mask)
            if g.dim() == 2:
                g = g[:, -1]
            p = p * (g if g.dim() == 0 else g[:, None, None])
        here = torch.ones(p.shape[:2], dtype=torch.bool, device=x.device)
        if frame.routing is not None:
            rows = frame.routing.rows(part.adapter, x.shape[0], x.device)
            if rows is not None:
                here = torch.zeros_like(here).index_fill(0, rows, True)
        pieces.append(p)
        real.append(here)
    return torch.cat(pieces, 1), torch.cat(real, 1)


def _embedded(host: Host, site: Any, call: dict[str, Any]) -> Tensor | None:
    x = call.get(site.argument)
    if x is not None:
        return x
    ids = call.get("input_ids")
    if ids is None or not site.enter:
        return None
    table = host.embedding()
    return table(ids)


def _past(call: dict[str, Any]) -> int:
    for key in CACHES:
        cache = call.get(key)
        if cache is None:
            continue
        length = getattr(cache, "get_seq_length", None)
        if length is not None:
            try:
                return int(length())
            except (TypeError, ValueError, NotImplementedError, IndexError, AttributeError):
                pass
        if isinstance(cache, (tuple, list)) and cache:
            return cache[0][0].shape[-2]
        has = getattr(cache, "has_previous_state", False)
        if has() if callable(has) else has:
            return 1
        position = call.get("cache_position")
        if isinstance(position, Tensor) and position.numel():
            return int(position.reshape(-1)[0])
    return 0


def _grow(call: dict[str, Any], key: str, change: Callable[[Tensor], Tensor]) -> None:
    if call.get(key) is not None:
        call[key] = change(call[key])


def _insert(mask: Any, real: Tensor, at: int, device: Any) -> Tensor:
    """`mask` with the n prompt positions in it: 2-D (B, T), or 4-D (B, 1, T, T) boolean or additive."""
    if not isinstance(mask, Tensor):
        raise CapabilityError(f"a prompt cannot be put before a {type(mask).__name__} mask", fix="Use 'sdpa' or 'eager' attention")
    n = real.shape[1]
    if mask.dim() == 2:
        rows = real.to(mask.dtype).expand(mask.shape[0], -1)
        return torch.cat([mask[:, :at], rows, mask[:, at:]], 1)
    if mask.dim() != 4 or not bool(real.all()) or at:
        raise CapabilityError(f"a prompt needs a 2-D attention mask here, not one of shape {tuple(mask.shape)}")
    value = True if mask.dtype == torch.bool else 0.0
    wide = F.pad(mask, (n, 0), value=value)
    if mask.shape[2] == mask.shape[3]:
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        first = torch.full_like(wide[:, :, :1], closed).expand(-1, -1, n, -1).clone()
        first[..., :n] = value
        wide = torch.cat([first, wide], 2)
    return wide


def _widen_memory(host: Host, parts: list[EmbedPart], call: dict[str, Any]) -> None:
    """A decoder's view of an encoder whose output kept its prompts: the encoder's mask grows with it."""
    mask, memory = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
    if memory is None:
        return
    n = sum(p.prompt().shape[0] for p in parts)
    keep = min(p.keep for p in parts)
    routing = host.state.frame.routing
    if mask is None:
        if routing is None:
            return
        mask = torch.ones(memory.shape[0], memory.shape[1] - n, dtype=torch.long, device=memory.device)
    if mask.dim() == 2 and mask.shape[1] + n == memory.shape[1]:
        real = []
        for p in parts:
            here = torch.ones(memory.shape[0], p.prompt().shape[0], dtype=torch.bool, device=memory.device)
            rows = routing.rows(p.adapter, memory.shape[0], memory.device) if routing is not None else None
            if rows is not None:
                here = torch.zeros_like(here).index_fill(0, rows, True)
            real.append(here)
        call["encoder_attention_mask"] = _insert(mask, torch.cat(real, 1), keep, memory.device)


def strip(out: Any, keep: int, n: int, total: int) -> Any:
    """`out` without the virtual tokens: every (B, total, d) state of it."""

    def cut(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == total:
            return torch.cat([t[:, :keep], t[:, keep + n :]], 1) if keep else t[:, n:]
        if isinstance(t, tuple):
            return tuple(cut(v) for v in t)
        return t

    if isinstance(out, Tensor) or type(out) is tuple:
        return cut(out)
    if hasattr(out, "keys"):
        for key in list(out.keys()):
            if key in ("last_hidden_state", "hidden_states"):
                out[key] = cut(out[key])
        return out
    return out


def signature_of(module: Any) -> inspect.Signature:
    """Of the class's forward, decorators removed and without self."""
    forward = inspect.unwrap(type(module).forward)
    sig = inspect.signature(forward)
    return sig.replace(parameters=list(sig.parameters.values())[1:])
