"""Building: from a plan and a model to parts that are not installed yet. Nothing here changes the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import resolve
from .errors import PlanError, SiteError, VeneerError
from .methods.base import Build, Method
from .methods.part import Part, like, module_at
from .patterns import select
from .plan import Plan
from .sites import Site
from .ties import once

if TYPE_CHECKING:
    from .probe import Probe


def make_parts(
    model: nn.Module, plan: Plan, dtype: torch.dtype | None = None, tokenizer: Any = None, *, blank: bool = False,
    probe: Probe | None = None, copied: Collection[int] = (),
) -> list[Part]:  # fmt: skip
    """The parts of `plan` for `model`, not yet installed; `blank` ones, and those of the terms `copied`, have shapes and no
    numbers. Changes nothing."""
    found = resolve.sites(model)
    parts: list[Part] = []
    shared: dict[Any, Any] = {}
    gated: dict[int, tuple[Any, list[Part]]] = {}
    for i, term in enumerate(plan.terms()):
        build = Build(model, gated=term.unscaled, dtype=dtype, tokenizer=tokenizer, blank=blank or i in copied, probe=probe)

        def sites(at: str | None, port: str, default: str, m: Method = term.method) -> list[Site]:
            why = "" if any(s.port == port for s in found) else resolve.why_not(model, port)
            able = [s for s in found if s.port != "weight" or not m.kinds or s.kind in m.kinds]
            if not why and not any(s.port == port for s in able):
                raise SiteError(f"{at or default!r} matches nothing: {m.name} acts on maps of kind {', '.join(m.kinds)}, and this model has none")
            try:
                chosen = select(able, at or default, port=port, default=at is None, why=why)
            except SiteError:
                other = [s for s in select(found, at or default, port=port, default=at is None, why=why) if s not in able]
                if not other:
                    raise
                raise SiteError(
                    f"{at or default!r} matches nothing that {m.name} can change: it acts on maps of kind {', '.join(m.kinds)}", where=other[0].path,
                    fix=f"Leave out what is of kind {other[0].kind}, or take a method that acts there: see vn.methods()",
                ) from None  # fmt: skip
            return once(model, chosen) if m.tied else chosen

        try:
            for site, part in term.method.parts(sites, build):
                part.stage, part.method_name = term.stage, term.method.name
                part.term, part.pace = i, term.pace
                part.tied = term.method.tied
                if term.gate is not None and part.acts:
                    part.gate = term.gate.make(site, part, entry_width(site, part, model), like(replace(build, blank=blank), site), term.member, shared)
                    part.published = term.gate.gate == "published" and part.acts == "kv"
                    gated.setdefault(id(term.gate), (term.gate, []))[1].append(part)
                if term.held:
                    part.freeze()
                parts.append(part)
        except VeneerError:
            raise
        except (RuntimeError, OverflowError, MemoryError) as e:  # sizes beyond any memory
            raise PlanError(f"{term.method.name} could not be built: {str(e).partition(chr(10))[0]}") from e
    for gate, own in gated.values():
        gate.check(own)
    if not parts:
        raise PlanError("the plan attaches to nothing in this model")
    return parts


def entry_width(site: Site, part: Part, model: nn.Module) -> int:
    """How many channels the input has that a gate at `site` reads."""
    if site.port in ("weight", "param") and site.kind != "embedding":
        module = module_at(model, site.enter or site.path)
        width = site.inp if site.kind in ("linear", "transposed") else _width(module, site)
        if site.kind == "experts":
            width = site.out if site.role == "ffn.down" else site.inp
        if site.port == "weight" and site.kind == "conv":
            width = getattr(module, "in_channels", width)
        return site.width if site.enter and site.width else width
    if site.kind == "embedding":
        return site.out
    if site.port == "kv":
        return _width(module_at(model, site.enter), site)
    return site.width


def _width(module: nn.Module, site: Site) -> int:
    """Channels of the module's input."""
    for key in ("in_features", "nx", "in_channels", "embed_dim", "hidden_size"):
        if isinstance(getattr(module, key, None), int):
            return getattr(module, key)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    p = module._parameters.get("weight")
    if p is not None:
        return p.shape[-1] if p.dim() == 1 else p.shape[0] if type(module).__name__ == "Conv1D" else p.shape[-1]
    return site.shape[-1] if site.shape else site.inp
