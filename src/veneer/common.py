"""Like tensors of many adapters in one piece of memory, which a training step of a routed batch reads, and gives gradients to, whole.

    S (n, Σ k_m, w)     S[e, k_1 + … + k_{m-1} : … + k_m] = the tensor (k_m, w) that adapter e has at map m

Where n adapters have one low-rank part each, of the same shapes, at the M maps of a group, their A's lie in one such S and
their B's in another. The parameters stay what they are: their names, their values, `.grad` and `requires_grad`, each its own.
Only the memory is shared, so a step takes one kernel for S where it took one for each of n M tensors, and an optimiser that
looks for neighbours (neighbours.py) updates them as one.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ops.fresh import fresh

if TYPE_CHECKING:
    from .host import Host
    from .methods.part import Part
    from .routing import Order

address, hooks, later = Tensor.data_ptr, attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
trains, grad = attrgetter("requires_grad"), attrgetter("grad")


def held(part: Part) -> list[Tensor]:
    """The tensors that a part's factors are made from."""
    return [t for t in chain(part._parameters.values(), part._buffers.values()) if t is not None]


def plain(part: Part) -> bool:
    """Whether the part adds s · B A x to what its map gives, and no more, from tensors of its own.

    What parts share in a bank would be copied for each of them (random projections may be as large as the base).
    """
    site = part.site
    if getattr(part, "factors", None) is None or site.port != "weight" or site.slice is not None or part.gate is not None or part.bank is not None:
        return False
    own = held(part)
    return bool(own) and bool(part.map.plain) and not part.map.read_by_others and all(type(t) in (nn.Parameter, Tensor) for t in own)


class Common:
    """One S: `own` are the tensors in it, adapter after adapter and map after map."""

    def __init__(self, own: list[Tensor], maps: int) -> None:
        self.own, self.maps = own, maps
        self.sizes = [t.shape[0] for t in own[:maps]]
        self.addresses: list[int] = []
        self.stack: Tensor | None = None
        self.given: Given | None = None
        self.used: set[int] = set()  # adapters whose gradient has come in this backward pass

    def views(self, s: Tensor) -> list[Tensor]:
        """The tensors in a stack of S's shape, in the order of `own`."""
        if len(set(self.sizes)) == 1:
            return list(s.reshape(len(self.own), self.sizes[0], -1).unbind(0))
        return [v for row in s.unbind(0) for v in row.split(self.sizes, 0)]

    def hold(self, mine: set[int]) -> bool:
        """Have all of `own` in S; False where one's memory is another's already (FSDP's, DeepSpeed's), or not on a device.

        mine  where the stacks begin in which they may lie so far
        """
        if self.stack is not None and list(map(address, self.own)) == self.addresses:
            return True
        for t in self.own:
            storage = t.untyped_storage()
            if t.is_meta or not t.is_contiguous() or (storage.nbytes() != t.nbytes and storage.data_ptr() not in mine):
                return False
        first = self.own[0]
        if len({(t.dtype, t.device) for t in self.own}) > 1:
            return False
        with torch.inference_mode(False), torch.no_grad():
            s = torch.empty(len(self.own) // self.maps, sum(self.sizes), first.shape[1], dtype=first.dtype, device=first.device)
            views = self.views(s)
            torch._foreach_copy_(views, [t.detach() for t in self.own])
            for t, v in zip(self.own, views, strict=True):
                t.data = v
        s.requires_grad_(True).register_post_accumulate_grad_hook(self.deal)
        self.stack, self.addresses = s, list(map(address, self.own))
        return True

    def take(self, order: Order, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
        """S · scale in `dtype`, (size, Σ k, w) in the order asked for."""
        self.used.clear()
        assert self.stack is not None
        return Taken.apply(self.stack if any(map(trains, self.own)) else self.stack.detach(), self, order, scale, dtype)

    def deal(self, s: Tensor) -> None:
        """Give each of `own` that trains its part of S's gradient."""
        with torch.no_grad():
            g, s.grad = s.grad, None
            assert g is not None
            mine = list(map(grad, self.own))
            if len(self.used) * self.maps < len(mine) or not all(map(trains, self.own)):
                return self._one_by_one(mine, g)
            kinds = set(map(type, mine))
            if kinds == {type(None)}:
                for t, v in zip(self.own, self._new(g), strict=True):
                    t.grad = v
            elif self.given is not None and all(map(is_, mine, self.given.views)):
                self.given.whole.add_(g)
            else:
                self._one_by_one(mine, g)

    def _new(self, g: Tensor) -> list[Tensor]:
        """g in parts. Thousands of tensors take longer to make and to free than to fill: those of the last step are taken again, in
        their memory, where nobody has kept any of them, or of what shares it."""
        last = self.given
        if last is None or not last.free() or last.whole.dtype != g.dtype or last.whole.device != g.device:
            self.given = last = Given(g, self.views(g))
        else:
            last.whole.copy_(g)
        return last.views

    def _one_by_one(self, mine: list[Tensor | None], g: Tensor) -> None:
        for i, (t, old, v) in enumerate(zip(self.own, mine, self.views(g), strict=True)):
            if not t.requires_grad or i // self.maps not in self.used:
                continue
            if old is None:
                t.grad = v
            else:
                old.add_(v)


class Given:
    """A gradient and its parts, and whether anyone else has them still."""

    def __init__(self, whole: Tensor, views: list[Tensor]) -> None:
        self.whole, self.views = whole, views
        self.users = self._users()

    def _users(self) -> int:
        count = getattr(torch._C, "_storage_Use_Count", None)
        return -1 if count is None else count(self.whole.untyped_storage()._cdata)

    def free(self) -> bool:
        """Nothing else lies in this memory, and the parts are in no hands but these: not even in a parameter's."""
        return 0 < self.users == self._users() and set(map(sys.getrefcount, self.views)) == {ALONE}


ALONE = max(map(sys.getrefcount, [object()]))  # what it counts of a thing that a list has


class Taken(torch.autograd.Function):
    """(S, its Common, order, scale, dtype) -> what `Common.take` says; the gradient is S's, in S's dtype."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, common: Common, order: Order, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
        ctx.common, ctx.order, ctx.dtype = common, order, s.dtype
        ctx.scale = scale if isinstance(scale, float) or order.same else order.forth(scale)
        return fresh(_times(s if order.same else order.forth(s), ctx.scale, dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        ctx.common.used.update(ctx.order.rows)
        ds = _times(g, ctx.scale, ctx.dtype)
        return ds if ctx.order.same else ctx.order.back(ds), None, None, None, None


def _times(t: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, t · scale in `dtype`, by one kernel."""
    out = torch.empty(t.shape, dtype=dtype, device=t.device)
    return out.copy_(t) if isinstance(scale, float) and scale == 1 else torch.mul(t, scale, out=out)


class Like:
    """What n adapters have at the M maps of a group: S of the A's, and S of the B's."""

    def __init__(self, names: list[str], parts: list[list[Part]], before: Like | None) -> None:
        """parts  [adapter][map];  before  where tensors may lie so far"""
        self.rows = {name: e for e, name in enumerate(names)}
        self.parts = [p for own in parts for p in own]
        pairs = [p.pair() for p in self.parts]
        self.down, self.up = (Common([pair[i] for pair in pairs], len(parts[0])) for i in (0, 1))
        self.scales: list[float] = []
        self.scale: float | Tensor = 1.0
        self.before = before

    def hold(self) -> bool:
        """Have both stacks, and the scales as they are now; False where that cannot be."""
        every = [*self.down.own, *self.up.own]
        if any(map(hooks, every)) or any(map(later, every)) or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False  # someone waits for each parameter's own gradient
        known = (self.down, self.up) if self.before is None else (self.down, self.up, self.before.down, self.before.up)
        mine = {c.stack.data_ptr() for c in known if c.stack is not None}
        if not (self.down.hold(mine) and self.up.hold(mine)):
            return False
        self.before = None
        scales = [float(p.scale) for p in self.parts]
        if scales != self.scales or (isinstance(self.scale, Tensor) and self.scale.device != self.up.own[0].device):
            self.scales, self.scale = scales, scales[0]
            if len(set(scales)) > 1:
                sizes = self.up.sizes * len(self.rows)
                each = torch.tensor(scales).repeat_interleave(torch.tensor(sizes)).view(len(self.rows), -1, 1)
                self.scale = each.to(self.up.own[0].device, self.up.own[0].dtype)
        return True

    def has(self, pairs: Iterable[tuple[str, int, Tensor, Tensor]]) -> bool:
        """Whether these (adapter, map, A, B) are the ones that lie here."""
        m = self.down.maps
        return all(name in self.rows and self.down.own[(i := self.rows[name] * m + k)] is a and self.up.own[i] is b for name, k, a, b in pairs)


class Shared(dict[Any, Like]):
    """The groups of one model, by their maps. A copy of the model starts with none: its tensors are its own."""

    def __reduce__(self) -> Any:
        return Shared, ()

    def find(self, hosts: Sequence[Host], attached: Container[str], names: list[str], pairs: list[tuple[str, int, Tensor, Tensor]]) -> Like | None:
        """The group of the maps at `hosts`, which has `pairs`, of the adapters `names`, and whatever else is like them; None where
        they are not like each other."""
        key = tuple(host.path for host in hosts)
        now = self.get(key)
        if now is not None and all(n in attached for n in now.rows) and now.has(pairs):
            return now
        found = alike([only(host) for host in hosts], names, now)
        if found is not None:
            self[key] = found
        return found


def only(host: Host) -> dict[str, Part]:
    """The part of each adapter that has one plain part at this host."""
    found: dict[str, list[Part]] = {}
    for part in host.parts:
        if plain(part):
            found.setdefault(part.adapter, []).append(part)
    return {name: own[0] for name, own in found.items() if len(own) == 1}


def alike(by_map: list[dict[str, Part]], names: Iterable[str], before: Like | None) -> Like | None:
    """The adapters whose one plain part at each map has tensors of its own like those of the adapters `names`, which are all among
    them; None where that is not so.

    by_map  for each map the part of every adapter that has just one
    """
    common = [n for n in by_map[0] if all(n in own for own in by_map)]
    kinds = {n: _kind([own[n] for own in by_map]) for n in common}
    wanted = {kinds.get(n) for n in names}
    if len(wanted) != 1 or None in wanted:
        return None
    chosen = [n for n in common if kinds[n] in wanted]
    found = Like(chosen, [[own[n] for own in by_map] for n in chosen], before)
    every = [*found.down.own, *found.up.own]
    return found if len({id(t) for t in every}) == len(every) else None


def _kind(parts: list[Part]) -> Any:
    """What must be the same for tensors to lie together; None where A and B are made anew for each call."""
    out = []
    for part in parts:
        a, b = part.pair()  # type: ignore[attr-defined]
        own = [*part._parameters.values(), *part._buffers.values()]
        if not any(t is a for t in own) or not any(t is b for t in own) or a.dim() != 2:
            return None
        out.append((a.shape, b.shape, a.dtype, b.dtype, a.device))
    return tuple(out) if len({kind[0][0] for kind in out}) == 1 else None
