"""What a route asks of a model whatever its rows are: the recipes for a set of adapters, and their maps in groups that read the
same input. Worked out once for each set; another batch of the same adapters changes only which row uses which."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .common import Like, held, plain
from .fused import SHARED, own_product
from .ops.trust import tried

if TYPE_CHECKING:
    from .host import Host
    from .methods.part import Part
    from .recipe import Recipe
    from .state import State

KEPT = 8  # sets of adapters


class Group:
    """M maps of one block that read the same input, and the low-rank parts that the adapters have there."""

    def __init__(self, members: list[tuple[str, list[Part], Host, nn.Module]], dtype: torch.dtype, own: bool) -> None:
        self.paths, self.hosts = [m[0] for m in members], [m[2] for m in members]
        maps, modules = [m[1] for m in members], [m[3] for m in members]
        self.dtype = dtype
        self.modules = modules if own else []  # those whose products are ours to write out
        self.first: list[Part] = [parts[0] for parts in maps]
        self.outs, self.inp = [part.site.out for part in self.first], self.first[0].site.inp
        self.dropouts = [{part.dropout for part in parts} for parts in maps]
        self.dropping = [drops != {0.0} for drops in self.dropouts]
        self.tensors = list({id(t): t for t in chain.from_iterable(held(part) for parts in maps for part in parts)}.values())
        self.by_name: list[dict[str, list[tuple[Part, int]]]] = [{} for _ in maps]  # of each map, the parts with their ranks
        pairs: list[tuple[str, int, Tensor, Tensor]] = []
        with torch.no_grad():
            for m, parts in enumerate(maps):
                for part in parts:
                    a, b = part.pair()  # type: ignore[attr-defined]
                    self.by_name[m].setdefault(part.adapter, []).append((part, a.shape[0]))
                    pairs.append((part.adapter, m, a, b))
        self.names = list(dict.fromkeys(name for own in self.by_name for name in own))
        self.single = all(len(own.get(name, ())) == 1 for own in self.by_name for name in self.names)
        self.pairs = pairs if self.single else []
        self.like: Like | None = None
        self.present, self._ranks = frozenset(self.names), {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy's tensors are its own."""
        return {**self.__dict__, "like": None}

    def rank(self, names: tuple[str, ...]) -> int:
        """The most that these adapters have together at one map."""
        if names not in self._ranks:
            self._ranks[names] = max(sum(r for name in names for _, r in own.get(name, ())) for own in self.by_name)
        return self._ranks[names]


class Kind:
    """The recipes and groups of one set of adapters."""

    def __init__(self, model: nn.Module, state: State, names: tuple[str, ...]) -> None:
        self.recipes: dict[str, Recipe | None] = {}
        self.groups: list[Group] = []
        chosen = set(names)
        self.held = [part._parameters for name, record in state.adapters.items() if name in chosen for part in record.parts]
        self.made_from = self.sources()
        together: dict[Any, list[tuple[str, list[Part], Host, nn.Module]]] = {}
        for path, host in state.hosts.items():
            r = self.recipes[path] = host.make(names, routed=True)
            parts = stackable(host, r) if r is not None else None
            if parts is None:
                continue
            site, module = parts[0].site, model.get_submodule(path)
            family = next((i for i, roles in enumerate(SHARED) if site.role in roles), path)
            dtypes = [p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()] or [torch.float32]
            key = path.rpartition(".")[0], family, site.inp, dtypes[0], held(parts[0])[0].device
            together.setdefault(key, []).append((path, parts, host, module))
        for (*_, dtype, device), members in together.items():
            if device.type == "cuda":
                tried(device)
            group = Group(members, dtype, all(own_product(host, module) for *_, host, module in members))
            if state.fuse is not None and group.single:
                group.like = state.shared.find(group.hosts, state.adapters, group.names, group.pairs)
            self.groups.append(group)

    def sources(self) -> list[int]:
        """Which tensors the adapters have now: a method may exchange them."""
        return list(map(id, chain.from_iterable(map(dict.values, self.held))))


def kind_of(model: nn.Module, state: State, names: tuple[str, ...]) -> Kind:
    """That of the adapters `names`, in any order."""
    key = frozenset(names)
    kind = state.kinds.pop(key, None)
    if kind is None or kind.made_from != kind.sources():
        # in the order of attaching: rows come in any
        kind = Kind(model, state, tuple(n for n in state.adapters if n in key))
    state.kinds[key] = kind
    while len(state.kinds) > KEPT:
        del state.kinds[next(iter(state.kinds))]
    return kind


def stackable(host: Host, r: Recipe) -> list[Part] | None:
    """The parts of a routed recipe's first stage, where all are plain and nothing comes before them."""
    first = r.outputs[0] if r.outputs else []
    if not first or r.inputs or r.kv or r.tensors or r.embed or r.memory or host.owned or host.reading or host.batch_dim:
        return None
    return first if all(map(plain, first)) else None
