"""Prompts before the embedded sequence of a tower, cut from its output again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .code import code_names, own_class
from .errors import CapabilityError

if TYPE_CHECKING:
    from .host import Host
    from .methods.parts import EmbedPart
    from .recipe import Recipe

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
    if site.batch_dim == 1:
        x = x.transpose(0, 1)
    batch, length, device = x.shape[0], x.shape[1], x.device
    before_call = {k for k, v in call.items() if v is not None}
    vectors, real = prompts(host, r.embed, x)
    n = vectors.shape[1]
    keep = min(p.keep for p in r.embed)
    state, before = host.state, host.state.frame
    lead = _leading(call.get("attention_mask")) if site.causal and not keep else None
    if cache_length(call) > 0:
        _grow(call, "attention_mask", lambda m: _insert(m, real, 0, device))
        if lead is not None:
            call["attention_mask"] = call["attention_mask"].gather(1, _front(real, lead, call["attention_mask"].shape[1]))
        for key in ("position_ids", "cache_position"):
            if call.get(key) is not None:
                call[key] = call[key] + (real.sum(1, keepdim=True) if key == "position_ids" else n)
        return forward(**call)
    names = host.signature.parameters
    ragged = not bool(real.all())
    order = _front(real, lead, length + n) if lead is not None else _order(real, keep, length) if ragged and not site.causal else None

    def arrange(t: Tensor) -> Tensor:
        if order is None:
            return t
        return t.gather(1, order.reshape(*order.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))

    wide = arrange(torch.cat([x[:, :keep], vectors, x[:, keep:]], 1))
    call[site.argument] = wide.transpose(0, 1) if site.batch_dim == 1 else wide
    for key in ("mask", "src_mask"):  # torch's own encoders
        if call.get(key) is not None:
            raise CapabilityError(f"a prompt does not know how to widen the argument {key!r}", fix="Give src_key_padding_mask, or no mask")
    _grow(call, "src_key_padding_mask", lambda m: torch.cat([m[:, :keep], m.new_zeros(batch, n), m[:, keep:]], 1))
    ids = next((k for k in ("input_ids",) if k in call), None)
    if ids is not None:
        call[ids] = None
    mask = call.get("attention_mask")
    if ragged:
        if "attention_mask" not in names:
            raise CapabilityError("prompts of different lengths in one batch need an attention mask", fix="Route rows with one prompt")
        if mask is None:
            mask = torch.ones(batch, length, device=device, dtype=torch.long)
    if mask is not None:
        call["attention_mask"] = _insert(mask, real, keep, device)
        if order is not None:
            call["attention_mask"] = arrange(call["attention_mask"])
        if "attention_mask" not in before_call and not _makes_mask(host.original):
            call["attention_mask"] = _additive(call["attention_mask"], x.dtype)
    positions = call.get("position_ids")
    count = real.sum(1, keepdim=True)
    from_mask = "cumsum" in code_names(host.original)  # OPT counts positions in the mask, blanks left out
    if positions is not None and positions.dim() == 2 or (ragged and site.causal and "position_ids" in names and not from_mask):
        own = positions if positions is not None else torch.arange(length, device=device)[None]
        if positions is None and lead is not None:
            own = (own - lead[:, None]).clamp(min=0)
        own = own.expand(batch, -1)
        virtual = (real.cumsum(1) - 1).clamp(min=0) + keep
        call["position_ids"] = torch.cat([own[:, :keep], virtual.to(own.dtype), own[:, keep:] + count.to(own.dtype)], 1)
        call["position_ids"] = arrange(call["position_ids"])
    if call.get("cache_position") is not None:
        call["cache_position"] = torch.arange(length + n, device=device)
    if call.get("token_type_ids") is not None:
        t = call["token_type_ids"]
        call["token_type_ids"] = torch.cat([t[:, :keep], t[:, :1].expand(-1, n), t[:, keep:]], 1)
        call["token_type_ids"] = arrange(call["token_type_ids"])
    two = call.get("attention_mask")
    state.frame = replace(before, mask=two if isinstance(two, Tensor) and two.dim() == 2 else None)
    try:
        out = forward(**call)
    finally:
        state.frame = before
    if r.embed[0].visible:
        return out
    back = None
    if order is not None:  # where the user's tokens went
        at = torch.arange(length, device=device)[None]
        back = at + (torch.where(at < keep, 0, count) if lead is None else torch.where(at < lead[:, None], n - count, n))
    if site.batch_dim == 1:
        return strip(out.transpose(0, 1), keep, n, length + n, back).transpose(0, 1)
    return strip(out, keep, n, length + n, back)


def _makes_mask(cls: type) -> bool:
    """Whether the tower turns a 2-D mask into what its attention takes."""
    return any("mask" in n and n.startswith(("create_", "_prepare_", "get_", "_update_", "_create_")) for n in code_names(cls))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A 2-D mask (B, T) as (B, 1, 1, T), zeros where it is 1: for towers that hand their mask on as it comes."""
    if mask.dim() != 2:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


def _order(real: Tensor, keep: int, length: int) -> Tensor:
    """For each row: what is kept first, its real prompt, the sequence, and then the blank positions.

    So the first token stays first, and distances between real tokens are as they are in a batch without other prompts.
    """
    batch, n = real.shape
    at = torch.arange(keep + n + length - keep, device=real.device).expand(batch, -1)
    blank = torch.zeros_like(at, dtype=torch.bool)
    blank[:, keep : keep + n] = ~real
    return torch.argsort(blank.to(torch.int8), dim=1, stable=True)


def _leading(mask: Any) -> Tensor | None:
    """How many positions of padding each row of a 2-D mask starts with; None where no row does."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool((mask[:, 0] == 0).any()):
        return None
    return (mask.cumsum(1) == 0).sum(1)


def _front(real: Tensor, lead: Tensor, total: int) -> Tensor:
    """For each row of a causal tower: blank positions and leading padding, then the prompt, then the sequence.

    So the prompt stands as near to the first token as it does without padding: positions may be relative, and windows
    count places whatever the mask says.
    """
    n = real.shape[1]
    token = torch.arange(total - n, device=real.device)[None] >= lead[:, None]
    return torch.argsort(torch.cat([real.expand(len(lead), -1), token], 1).to(torch.int8), dim=1, stable=True)


def prompts(host: Host, parts: list[EmbedPart], x: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts for x (B, T, d) as (B, n, d), and which of the n positions are real in each row (B, n).

    Rows with shorter prompts have theirs at the end, next to the sequence, so that distances are as without the others.
    """
    frame, batch = host.state.frame, x.shape[0]
    routing = frame.routing
    if routing is None:
        joined = torch.cat([_prompt(part, x, frame, frame.mask) for part in parts], 1)
        return joined, torch.ones(joined.shape[:2], dtype=torch.bool, device=x.device)
    each = batch // routing.size
    if batch % routing.size:
        routing.rows(parts[0].adapter, batch, x.device)  # says what is wrong
    own = {p.adapter for p in parts}
    groups: dict[frozenset[str], list[int]] = {}
    for i in range(batch):
        groups.setdefault(frozenset(own.intersection(routing.by_row[i // each])), []).append(i)
    made, lengths = [], []
    for names, mine in groups.items():
        at = torch.tensor(mine, device=x.device)
        mask = frame.mask if frame.mask is None or frame.mask.shape[0] != batch else frame.mask.index_select(0, at)
        pieces = [_prompt(p, x.index_select(0, at), frame, mask) for p in parts if p.adapter in names]
        made.append(torch.cat(pieces, 1) if pieces else x.new_zeros(len(mine), 0, x.shape[2]))
        lengths.append(made[-1].shape[1])
    n = max(lengths)
    order = torch.tensor([i for mine in groups.values() for i in mine], device=x.device).argsort()
    count = torch.tensor([m for m, mine in zip(lengths, groups.values(), strict=True) for _ in mine], device=x.device)[order]
    real = torch.arange(n, device=x.device) >= n - count[:, None]
    return torch.cat([F.pad(m, (0, 0, n - m.shape[1], 0)) for m in made]).index_select(0, order), real


def _prompt(part: EmbedPart, x: Tensor, frame: Any, mask: Tensor | None) -> Tensor:
    """The prompt of `part` for each row of x (B, T, d), as (B, n, d), scaled by its gate."""
    p = part.prompt().to(x.dtype)[None].expand(x.shape[0], -1, -1)
    if part.gate is None:
        return p
    from .routing import gate_of

    g = gate_of(part, x, replace(frame, memo=None), mask)
    if g.dim() == 2:
        g = g[:, -1]
    return p * (g if g.dim() == 0 else g[:, None, None])


def _embedded(host: Host, site: Any, call: dict[str, Any]) -> Tensor | None:
    x = call.get(site.argument)
    if x is not None:
        return x
    ids = call.get("input_ids")
    if ids is None or not site.enter:
        return None
    table = host.embedding()
    return table(ids)


def cache_length(call: dict[str, Any]) -> int:
    """How many positions the cache among the arguments holds; 0 without one."""
    return int(cache_size(call))


def cache_size(call: dict[str, Any]) -> int | Tensor:
    """`cache_length`, as a static cache counts it: a tensor on its device, so that nothing waits for that."""
    for key in CACHES:
        cache = call.get(key)
        if cache is None:
            continue
        length = getattr(cache, "get_seq_length", None)
        if length is not None:
            try:
                size = length()
                return size.clone() if isinstance(size, Tensor) else int(size)  # a static cache counts on in place
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
    keep = min(p.keep for p in parts)
    blank = memory.new_zeros(memory.shape[0], 1, parts[0].site.width)
    with torch.no_grad():
        real = prompts(host, parts, blank)[1]
    n = real.shape[1]
    if mask is None:
        if bool(real.all()):
            return
        mask = torch.ones(memory.shape[0], memory.shape[1] - n, dtype=torch.long, device=memory.device)
    if mask.dim() == 2 and mask.shape[1] + n == memory.shape[1]:
        wide = _insert(mask, real, keep, memory.device)
        if not bool(real.all()):
            wide = wide.gather(1, _order(real, keep, mask.shape[1]))
        call["encoder_attention_mask"] = wide


def strip(out: Any, keep: int, n: int, total: int, back: Tensor | None = None) -> Any:
    """`out` without the virtual tokens: every (B, total, d) state of it. `back` says where each row's tokens are."""

    def cut(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == total:
            if back is not None:
                return t.gather(1, back[..., None].expand(-1, -1, t.shape[2]))
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
    """Of the forward of the module's own class, decorators removed and without self."""
    sig = inspect.signature(inspect.unwrap(own_class(module).forward))  # type: ignore[attr-defined]
    return sig.replace(parameters=list(sig.parameters.values())[1:])
