"""Ties: a tensor that several modules hold, as a token embedding and a head. What acts on it acts at each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import resolve
from .methods.part import Part, module_at
from .methods.parts import MapPart
from .ops.maps import map_of
from .sites import Site
from .structure import base_modules

if TYPE_CHECKING:
    from .compose.gate import Gate


class Echo:
    """A part as it acts at another module that holds the part's tensor: the same numbers, so one gradient and one file.

    Where both modules apply the tensor alike (two embeddings) its rule is the part's own; where one applies the transpose of
    what the other does (a head y = W x, an embedding W^T e) it is `part.across`; a module that reads the tensor otherwise
    gets the part's value for it.
    """

    published = visible = False
    places = None

    def __init__(self, part: Part, site: Site, module: nn.Module) -> None:
        self.part, self.site = part, site
        self.cell: Any = None
        self.owner: Any = None
        self.map = map_of(site, module) if site.port == "weight" else None
        self.alike = site.kind == part.site.kind
        self.acts = "tensor" if self.map is None or self.map.read_by_others or part.acts == "tensor" else part.acts if self.alike else "output"
        # what changes a map's input changes W itself, so at the transpose it comes before what looks at the output
        self.stage = part.stage - 0.5 if part.acts == "input" and self.acts == "output" else part.stage

    @property
    def adapter(self) -> str:
        return self.part.adapter

    @property
    def method_name(self) -> str:
        return self.part.method_name

    @property
    def gate(self) -> Gate | None:
        return self.part.gate

    @gate.setter
    def gate(self, gate: Gate | None) -> None:
        self.part.gate = gate

    def sees(self, x: Tensor, h: Tensor) -> Tensor:
        return x

    def inward(self, x: Tensor) -> Tensor:
        return self.part.inward(x)  # type: ignore[attr-defined]

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        if self.alike:
            return self.part.deviation(x, h)  # type: ignore[attr-defined]
        assert isinstance(self.part, MapPart) and self.map is not None
        return self.part.across(self.map, x, h)

    def idle(self) -> bool:
        return self.part.idle()

    def value(self, p: Tensor) -> Tensor:
        return self.part.value(p)  # type: ignore[attr-defined]


class Ties:
    """Which modules of a model hold the same tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: dict[int, list[tuple[str, str, nn.Module]]] = {}
        for path, module in base_modules(model):
            for name, p in module._parameters.items():
                if p is not None:
                    self.held.setdefault(id(p), []).append((path, name, module))
        self._sites: list[Site] | None = None

    def echoes(self, part: Part) -> list[Echo]:
        """What `part` does at the other modules that hold its tensor."""
        own = module_at(self.model, part.site.path)
        tensor = own._parameters.get(part.site.tensor or "weight")
        if part.site.port not in ("weight", "param") or not part.tied or tensor is None:
            return []
        return [Echo(part, self._site(part, path, name, module), module) for path, name, module in self.held[id(tensor)] if module is not own]

    def _site(self, part: Part, path: str, name: str, module: nn.Module) -> Site:
        if self._sites is None:
            self._sites = resolve.sites(self.model)
        mine = part.site
        for s in self._sites:
            if s.path == path and s.port == mine.port and (s.tensor or "weight") == name:
                return replace(s, slice=mine.slice, out=mine.out, inp=mine.inp) if s.kind == mine.kind else s
        if mine.kind == "embedding" and getattr(module, "num_embeddings", None) is not None:
            return replace(mine, path=path, tensor=name)
        return replace(mine, path=path, tensor=name, port="param", kind="", enter="", slice=None)


def once(model: nn.Module, sites: list[Site]) -> list[Site]:
    """`sites` without those whose tensor one before them has: a method changes a tied tensor once."""
    seen: set[Any] = set()
    out = []
    for s in sites:
        p = module_at(model, s.path)._parameters.get(s.tensor or "weight") if s.port in ("weight", "param") else None
        key = (id(p), s.slice)
        if p is not None and key in seen:
            continue
        seen.add(key)
        out.append(s)
    return out


def shared(model: nn.Module, sites: Iterable[Site]) -> bool:
    """Whether another module holds a tensor of one of `sites`."""
    held = Ties(model).held
    tensors = [module_at(model, s.path)._parameters.get(s.tensor or "weight") for s in sites if s.port in ("weight", "param")]
    return any(p is not None and len(held[id(p)]) > 1 for p in tensors)
