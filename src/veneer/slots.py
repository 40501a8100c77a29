"""Slots: what the adapters of a routed batch have at its maps, as stacks that one product reads for all rows.

A slot is one set of adapters that rows use. Where all that acts on a map is the plain case (ungated low-rank parts that give
their factors), the factors of all slots lie in two stacks, and `ops.routed` answers for the whole batch in as many kernels as
one adapter takes. Everything else keeps the general path in host.py.

Stacks are copies in the dtype of the activations. They are filled anew when vn.route is entered, when a tensor that they
were made from has changed (torch counts the changes), and for every call with gradients.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import autocasting
from .eager import Eager
from .fused import Together
from .groups import Group, kind_of
from .ops import gemv, routed, rows
from .ops.routed import Places, Stack

if TYPE_CHECKING:
    from .common import Like
    from .methods.part import Part
    from .routing import Routing
    from .state import State

version, trains = attrgetter("_version"), attrgetter("requires_grad")


def prepare(model: nn.Module, state: State, named: list[tuple[str, ...]]) -> Routing:
    """The routing of rows `named` so, with every host's recipe for it. The last one is kept, since batches often repeat it."""
    from .routing import Routing

    by_row, depth = tuple(named), 0 if state.frame.routing is None else state.frame.routing.number + 1
    routing = Routing(by_row)
    kind = kind_of(model, state, routing.names)
    for old in state.routings[depth:]:
        if old.number == depth and old.by_row == by_row and old.kind is kind:
            for s in old.slots:
                s.stale = True
            return old
        old.number = -1  # from here on it has its own recipes alone
    routing.number, routing.kind, routing.fused = depth, kind, state.fuse is not None
    state.routings[depth:] = [routing]
    state.ready = torch.compiler.disable(_ready)
    for path, host in state.hosts.items():
        r = kind.recipes.get(path)
        r = routing.recipes[path] = None if r is None else replace(r)
        host.prepared[depth:] = [r]
    for group in kind.groups:
        slots = Slots(routing, group)
        routing.slots.append(slots)
        for i, path in enumerate(group.paths):
            r = routing.recipes[path]
            assert r is not None
            r.slots, r.place, r.alone = slots, i, not r.captures and not r.later
    return routing


def _ready(routing: Routing, goes_on: bool) -> None:
    """Have all stacks as the parameters are now. A call that goes on from a cache keeps those that the cache was made with."""
    grad = torch.is_grad_enabled()
    for s in routing.slots:
        if grad or s.stale or not goes_on:
            s.ready()


class Slots(Together):
    """The stacks of M maps that read the same input: A (E, M r, in) and B (E, Σ out, r), for the largest rank r of a slot."""

    def __init__(self, routing: Routing, group: Group) -> None:
        super().__init__()
        self.group, self.routing, self.size, self.dtype, self.stale = group, routing, routing.size, group.dtype, True
        for _ in group.outs:
            self.join()
        self.sets, self.numbers = sets, _ = routing.sets(group.present)
        self.index: Tensor | None = None
        self.rank, self.outs = max(map(group.rank, sets)), group.outs
        self.like: Like | None = None  # where their tensors lie in common memory, and which of it the slots take
        self.order: Any = None
        filled = [names for names in sets if names]
        if group.like is not None and all(len(names) == 1 for names in filled):
            self.like, self.order = group.like, routing.order([group.like.rows[n] for (n,) in filled], sets, len(group.like.rows))
        self.parts: list[Part] = []
        self.down_places: Any = None
        self.up_places: Any = None
        self.still: list[Tensor] = []  # A, B, and B's part of each map
        self.eager: Eager | None = None  # for calls that nothing follows
        self.live: list[Tensor] = []  # the same as functions of the parts' parameters
        self.seen = -1
        self.products = Products(self, group.modules) if group.modules else None
        self.fits = False  # whether this call's input is for the decoding kernel

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with no stacks."""
        return {**self.__dict__, "still": [], "live": [], "index": None, "stale": True, "like": None, "eager": None}

    # -- stacks -------------------------------------------------------------------------------------------------------
    def _common(self) -> list[Tensor] | None:
        """A and B from common storage; None where they are not there."""
        if self.like is None or not self.like.hold():
            return None
        return [c.take(self.order, s, self.dtype) for c, s in ((self.like.down, 1.0), (self.like.up, self.like.scale))]

    def ready(self) -> None:
        """Have the stacks as the parameters are now."""
        self._stack()
        a, _, *ups = self.now()
        index = self.at(a.device)
        if self.live or index is not None or gemv.EAGER or rows.EAGER:
            self.eager = None
        elif self.eager is None or self.eager.down.data_ptr() != a.data_ptr():
            self.eager = Eager(a, ups, self.rank, self.size)

    def _stack(self) -> None:
        if torch.is_grad_enabled() and any(map(trains, self.group.tensors)):
            common = self._common()
            if common is not None:
                self.live = [*common, *common[1].split(self.outs, 1)]
                self.stale = True
                return
            downs, ups, scales = self._factors()
            a = Stack.apply(self.down_places, None, self.dtype, *downs)
            b = Stack.apply(self.up_places, scales, self.dtype, *ups)
            self.live = [a, b, *b.split(self.outs, 1)]
            self.stale = True  # a step may follow
            return
        self.live = []
        now = sum(map(version, self.group.tensors))
        if self.stale or now != self.seen or not self.still:
            self._fill()
            self.seen, self.stale = now, False

    def _lay_out(self) -> None:
        """Which part's factors go where in the stacks."""
        group, r = self.group, self.rank
        spans: list[tuple[int, int, int, int]] = []  # map, slot, and which of its ranks
        for m, own in enumerate(group.by_name):
            for e, names in enumerate(self.sets):
                used = 0
                for part, rank in (one for name in names for one in own.get(name, ())):
                    spans.append((m, e, used, used + rank))
                    self.parts.append(part)
                    used += rank
        tops = [0, *accumulate(self.outs)]
        self.down_places = Places((len(self.sets), len(self.outs) * r, group.inp), [(e, m * r + p, m * r + q, 0, group.inp) for m, e, p, q in spans])
        self.up_places = Places((len(self.sets), tops[-1], r), [(e, tops[m], tops[m + 1], p, q) for m, e, p, q in spans])

    def _factors(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        if not self.parts:
            self._lay_out()
        pairs = [part.pair() for part in self.parts]
        return [a for a, _ in pairs], [b for _, b in pairs], [float(part.scale) for part in self.parts]

    def _fill(self) -> None:
        # outside of inference mode, whose tensors could not be filled again elsewhere
        with torch.inference_mode(False), torch.no_grad():
            downs, ups, scales = self._factors()
            if not self.still or self.still[0].dtype != self.dtype or self.still[0].device != downs[0].device:
                a, b = (places.new(downs[0], self.dtype) for places in (self.down_places, self.up_places))
                for t in (a, b):
                    torch._dynamo.mark_static_address(t, guard=False)
                self.still = [a, b, *b.split(self.outs, 1)]
            routed.fill(self.still[0], self.down_places, downs)
            routed.fill(self.still[1], self.up_places, ups, scales)

    def at(self, device: torch.device) -> Tensor | None:
        if self.numbers is not None and (self.index is None or self.index.device != device):
            self.index = self.routing.tensor(self.numbers, device)
        return self.index

    # -- one call -----------------------------------------------------------------------------------------------------
    def stacks(self, i: int, x: Tensor, framed: bool) -> list[Tensor] | None:
        """The stacks for x, or None where the general path has to answer.

        framed  whether the model's own call came first, and saw to the stacks
        """
        if not x.is_floating_point() or not x.shape[0] or x.shape[0] % self.size or (self.group.first[i].training and len(self.group.dropouts[i]) > 1):
            return None
        now = self.now()
        if now and framed and now[0].dtype == x.dtype and now[0].device == x.device:
            return now
        if torch.compiler.is_compiling():
            return None
        self.dtype = x.dtype
        self.ready()
        return self.now() if self.now()[0].device == x.device else None

    def learning(self) -> bool:
        """Whether the stacks of `now` are those that gradients reach."""
        # torch 2.11's tracer can neither compare lists by identity nor take one for a truth
        return len(self.live) > 0 and torch.is_grad_enabled()

    def now(self) -> list[Tensor]:
        return self.live if self.learning() else self.still

    def quick(self, i: int) -> Eager | None:
        """What answers for map i in a call within the model's that neither autograd nor a compiler follows."""
        # in this order: a compiler need not look at what it never takes
        return None if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.eager is None or self._drops(i) else self.eager

    def product(self, i: int, x: Tensor, framed: bool) -> Tensor | None:
        """y of map i and its parts in one operation, or None where `call` does as well or the product is not ours."""
        if self.products is None or x.dtype != self.dtype or autocasting(x):
            return None
        stacks = self.stacks(i, x, framed)
        if stacks is None or gemv.fits(x, self.size, len(self.outs)):
            return None
        if not rows.fits(x, self.size, self.outs, [self.rank]) and not (self.routing.fused and self.learning()):
            return None
        return self.products.answer(i, x, self._drops(i))

    def call(self, i: int, x: Tensor, y: Tensor, framed: bool) -> Tensor | None:
        """y with the deviations of map i's parts added, or None where the general path has to do it."""
        stacks = self.stacks(i, x, framed) if x.dtype == y.dtype else None
        if stacks is None:
            return None
        drops = self._drops(i)
        self.fits = not drops and not self.learning() and gemv.fits(x, self.size, len(self.outs))
        z = self.answer(i, x, drops)
        if self.fits and (len(self.outs) == 1 or not self.apart):
            return y + z.view(y.shape)
        return routed.add(y, z, stacks[2 + i], self.at(x.device))

    def _drops(self, i: int) -> bool:
        return self.group.dropping[i] and self.group.first[i].training

    def run(self, which: list[int], x: Tensor) -> list[Tensor]:
        """Their z; where decoding has its own kernel, and they are all of them, B z."""
        (a, b, *_), r, whole = self.now(), self.rank, len(which) == len(self.outs)
        if self.fits and whole:
            return list(routed.decoded(x.reshape(-1, x.shape[-1]), a, b, self.at(x.device), self.outs).split(self.outs, -1))
        if len(which) == 1:
            x = self.group.first[which[0]].entry(x)
        return list(routed.low(x, a if whole else a.narrow(1, which[0] * r, r), self.at(x.device)).split(r, -1))

    def state(self) -> Any:
        return self.seen, len(self.live)


class Products(Together):
    """The maps of `Slots` where each y = W x + c is computed together with its parts."""

    def __init__(self, slots: Slots, modules: list[nn.Module]) -> None:
        super().__init__()
        self.slots, self.modules = slots, modules
        for _ in modules:
            self.join()

    def run(self, which: list[int], x: Tensor) -> list[Tensor]:
        s, dropped = self.slots, None
        a, b, *own = s.now()
        if len(which) < len(self.modules):
            a, b = a.narrow(1, which[0] * s.rank, s.rank), own[which[0]]
        if len(which) == 1:
            dropped = s.group.first[which[0]].entry(x)
        ws, cs = ([self.modules[i]._parameters[name] for i in which] for name in ("weight", "bias"))
        return rows.rows(x, ws, cs, a, b, s.at(x.device), None if dropped is x else dropped)  # type: ignore[arg-type]

    def state(self) -> Any:
        return self.slots.state()
