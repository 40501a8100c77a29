"""A space of plans: methods x targets x sizes x layers, or a list of plans; strict, from a dict or YAML."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import resolve
from ..build import make_parts
from ..errors import ConfigError, PlanError, VeneerError, did_you_mean
from ..methods import methods
from ..patterns import select as pick
from ..plan import Plan, Sum, gated, short
from ..sites import Site
from ..static import narrow
from ..train.rates import rate_of
from .measure import merges
from .part import Choose, Form, PartSpace, ascending, forms
from .reading import read

Place = tuple[str, int]  # a layer: its tower, its number


@dataclass(frozen=True)
class Candidate:
    """A plan of the space, and the learning rate to train it with."""

    plan: Plan
    rate: float

    @property
    def key(self) -> str:
        """The same for the same candidate, in any process."""
        return json.dumps([self.plan.to_dict(), self.rate], sort_keys=True)


@dataclass
class Space:
    """Plans to choose among, for one model.

    A dict has either `plans`, a list of plans (a preset's name, or what vn.Plan.from_dict takes), or `parts`:

        parts     methods with their options, each a value or a list of choices: {method: lora, r: [0, 4, 8], at: [linear]}.
                  A 0 for a whole number (r, size, length) leaves the method out; `optional: true` does for one without
        together  'any' (default): the parts that are on, side by side; 'one': exactly one of them
        layers    'all' (default); 'each': every layer on or off for all parts alike (AutoPEFT); or slices to choose
                  from, as [":", "6:", "8:"]
        gated     False (default), True, 'example', 'token', 'constant', or a list of these: UniPELT's gates over all parts
        rates     factors of the methods' own default learning rate (train/rates.py) to choose from; default [1]

    Raises: ConfigError for an unknown key or value, PlanError or SiteError for a method that this model cannot take.
    """

    model: nn.Module
    parts: list[PartSpace] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    together: str = "any"
    layers: str | list[str] = "all"
    gates: list[str | None] = field(default_factory=lambda: [None])
    rates: list[float] = field(default_factory=lambda: [1.0])
    beside: Plan | None = None
    name: str = "own"
    left_out: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(data: Any, model: nn.Module, *, beside: Plan | None = None, where: str = "space") -> Space:
        """The space that `data` describes: a name (spaces.NAMED), a list of plans, or a dict as above."""
        from .spaces import NAMED

        name, lenient = "own", False
        if isinstance(data, Space):
            return dataclasses.replace(data, model=model, beside=beside)
        if isinstance(data, str):
            if data not in NAMED:
                raise ConfigError(f"there is no space {short(data)}", where=where, fix=did_you_mean(data, NAMED))
            name, lenient = data, True  # a space of ours takes what the model has; what you write must fit
            data = NAMED[data](model)
        if isinstance(data, (list, tuple)):
            data = {"plans": list(data)}
        space = Space(model, **read(data, where))
        space.name, space.beside = name, beside
        space._check(lenient)
        return space

    # -- what is in it -------------------------------------------------------------------------------------------------
    @property
    def places(self) -> list[Place]:
        """Every layer that a site of the model is in."""
        found = {(s.tower, s.layer): None for s in resolve.sites(self.model) if s.layer is not None}
        return sorted(found)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """How many candidates it has, the empty plan not counted (equal ones counted each time)."""
        if self.plans:
            return len(self.plans) * len(self.rates)
        several = len(self.parts) > 1
        gates = sum(1 for g in self.gates if g is None or any(p.method.gateable for p in self.parts))
        layers = 1 if self.layers == "all" else len(self.layers) if isinstance(self.layers, list) else 2 ** len(self.places) - 1
        if self.together == "one":
            ways = sum(p.size for p in self.parts)
        else:
            ways = math.prod(p.size + p.can_be_off for p in self.parts) - all(p.can_be_off for p in self.parts)
        return ways * layers * (gates if several or self.gates != [None] else 1) * len(self.rates)

    def draw(self, choose: Choose) -> Candidate | None:
        """The candidate that `choose` leads to; None where it leaves everything out."""
        if self.plans:
            plan = self.plans[self._one("plan", self.plans, choose)]
        else:
            chosen = [p.draw(choose) for p in self.parts] if self.together == "any" else [self._only(choose)]
            mask = self._mask(choose) if any(p is not None for p in chosen) else None
            masked = [q for p in chosen if p is not None and (q := self._masked(p, mask)) is not None]
            if not masked:
                return None
            plan = _gate(masked, self.gates[self._one("gates", self.gates, choose)])
        rate = self.rates[self._one("rate", self.rates, choose)]
        return self._candidate(plan, rate)

    def __iter__(self) -> Iterator[tuple[dict[str, int], Candidate]]:
        """Every candidate, with the choices that lead to it."""
        path: list[list[int]] = []
        while True:
            depth, taken = itertools.count(), {}

            def walk(name: str, options: Sequence[Any], ordered: bool, depth: Any = depth, taken: Any = taken) -> int:
                at = next(depth)
                if at == len(path):
                    path.append([0, len(options)])
                taken[name] = path[at][0]
                return path[at][0]

            found = self.draw(walk)
            if found is not None:
                yield dict(taken), found
            del path[next(depth) :]
            while path and path[-1][0] + 1 == path[-1][1]:
                path.pop()
            if not path:
                return
            path[-1][0] += 1

    def starts(self) -> list[dict[str, int]]:
        """Choices worth trying first: each part alone and all together, in all layers, in their middle size, ungated."""

        def middle(alone: str | None) -> dict[str, int]:
            taken: dict[str, int] = {}

            def choose(name: str, options: Sequence[Any], ordered: bool) -> int:
                part = next((p for p in self.parts if name == p.name or name.startswith(f"{p.name}.")), None)
                index = 0
                if name == "part":
                    index = list(options).index(alone) if alone in options else 0
                elif part is not None:
                    off = alone is not None and part.name != alone
                    switch = name == part.name or name.split(".", 1)[1] in part.switches
                    index = (0 if off else 1 + (len(options) - 1) // 2 if len(options) > 2 else 1) if switch else (len(options) - 1) // 2 if ordered else 0
                    if switch and name != part.name:
                        zero = list(options).index(0) if 0 in options else -1
                        rest = [i for i in range(len(options)) if i != zero]
                        index = zero if off and zero >= 0 else rest[len(rest) // 2]
                elif name.startswith("layer."):
                    index = 1
                elif name == "rate":
                    index = len(options) // 2
                taken[name] = index
                return index

            return taken if self.draw(choose) is not None else {}

        if self.plans:
            return []
        names: list[str | None] = [p.name for p in self.parts]
        if self.together == "any" and len(self.parts) > 1:
            names = [*names, None]
        found = [middle(n) for n in names]
        return [f for i, f in enumerate(found) if f and f not in found[:i]]

    def cheapest(self, count: Callable[[Plan], int]) -> tuple[Candidate, int]:
        """The candidate with the fewest parameters, and how many those are. Parts add up, and each layer adds, so one part in
        one layer is compared with the others, not every combination."""
        if self.plans:
            found = min(self.plans, key=lambda p: count(self._candidate(p, 1.0).plan))
            return self._candidate(found, self.rates[0]), count(self._candidate(found, 1.0).plan)
        masks: list[Any] = [None]
        if self.layers == "each":
            masks = [frozenset([p]) for p in self.places]
        elif isinstance(self.layers, list):
            masks = list(self.layers)
        best: tuple[int, Plan] | None = None
        for mask in masks:
            least = {p.name: min((n, m) for m in forms(p) if (n := self._count(m, mask, count)) is not None) for p in self.parts if forms(p)}
            need = [p.name for p in self.parts if not p.can_be_off] if self.together == "any" else []
            chosen = [least[n] for n in need] if need else [min(least.values(), key=lambda f: f[0])]
            total = sum(f[0] for f in chosen)
            if best is None or total < best[0]:
                best = total, _gate([m for f in chosen if (m := self._masked(f[1].plan, mask)) is not None], self.gates[0])
        assert best is not None
        found = self._candidate(best[1], self.rates[0])
        return found, count(found.plan)

    def merging(self) -> Space:
        """The same space without what does not merge, so that nothing costs time at inference.

        Raises: ConfigError where nothing is left.
        """
        parts, plans = [p for p in self.parts if p.method.mergeable], [p for p in self.plans if merges(p)]
        needed = [p.name for p in self.parts if p not in parts and not p.can_be_off and self.together == "any"]
        gates = [g for g in self.gates if g in (None, "constant")]
        if needed or not (parts or plans) or not gates:
            what = ", ".join(needed or [p.name for p in self.parts] or map(str, self.plans))
            those = ", ".join(m.name for m in methods() if "mergeable" in m.capabilities)
            raise ConfigError(f"latency: +0% takes only what merges, and {what} does not", where="budget.latency", fix=f"These methods merge: {those}")
        return dataclasses.replace(self, parts=parts, plans=plans, gates=gates)

    def describe(self) -> dict[str, Any]:
        """What it holds, as plain data."""
        if self.plans:
            return {"name": self.name, "plans": [p.to_dict() for p in self.plans], "rates": self.rates}
        parts = [{"method": p.method.name} | p.fixed | p.choices | ({"optional": True} if p.optional else {}) for p in self.parts]
        rest = {"together": self.together, "layers": self.layers, "gated": self.gates, "rates": self.rates, "left_out": self.left_out}
        return {"name": self.name, "parts": parts} | rest

    def _count(self, form: Form, mask: Any, count: Callable[[Plan], int]) -> int | None:
        plan = self._masked(form.plan, mask)
        return None if plan is None else count(plan)

    # -- its making ------------------------------------------------------------------------------------------------------
    def _candidate(self, plan: Plan, factor: float) -> Candidate:
        rate = float(f"{rate_of(plan) * factor:.6g}")
        own = {json.dumps(m.to_dict()) for m in plan.leaves()}
        if self.beside is not None and not all(json.dumps(m.to_dict()) in own for m in self.beside.leaves()):
            plan = plan + self.beside
        return Candidate(plan, rate)

    @staticmethod
    def _one(name: str, options: Sequence[Any], choose: Choose) -> int:
        return choose(name, options, ascending(options)) if len(options) > 1 else 0

    def _only(self, choose: Choose) -> Plan | None:
        names = [p.name for p in self.parts]
        return self.parts[self._one("part", names, choose)].draw(choose, on=True)

    def _mask(self, choose: Choose) -> Any:
        """What `_masked` takes: None (all layers), a slice, or the set of layers that are on."""
        if isinstance(self.layers, list):
            return self.layers[self._one("layers", self.layers, choose)]
        if self.layers == "all":
            return None
        places = self.places
        towers = len({t for t, _ in places}) > 1
        on = [p for p in places if choose(f"layer.{p[0] + '.' if towers else ''}{p[1]}", (False, True), True)]
        return None if len(on) == len(places) else frozenset(on)

    def _masked(self, plan: Any, mask: Any) -> Plan | None:
        """The method `plan` in the layers of `mask` only; one that is in no layer stays as it is. None: nothing is left."""
        if mask is None or mask == ":":
            return plan
        key = (json.dumps(plan.to_dict()), mask)
        cache = self.__dict__.setdefault("_cache", {})
        if key not in cache:
            cache[key] = self._narrowed(plan, mask)
        return cache[key]

    def _narrowed(self, plan: Any, mask: Any) -> Plan | None:
        sites = [p.site for p in make_parts(self.model, plan, blank=True)]
        if len({s.port for s in sites}) > 1:
            raise PlanError(f"{plan.name} acts at several ports, so its layers cannot be chosen", where="space.layers", fix="Set layers: all")
        if not any(s.layer is not None for s in sites):
            return plan
        if isinstance(mask, str):
            inside = {(s.path, s.slice) for s in pick(resolve.sites(self.model), f"all@{mask}", port=sites[0].port)}
            kept = [s for s in sites if (s.path, s.slice) in inside]
        else:
            kept = [s for s in sites if (s.tower, s.layer) in mask]
        if not kept:
            return None
        if len(kept) == len(sites):
            return plan
        found = dataclasses.replace(plan, at=narrow(self.model, kept))
        if [_identity(p.site) for p in make_parts(self.model, found, blank=True)] != [_identity(s) for s in kept]:
            raise PlanError(f"{plan} in some layers only cannot be written as a plan", where="space.layers", fix="Set layers: all")
        return found

    def _check(self, lenient: bool) -> None:
        """Build every part once: a space whose plans do not fit is refused now, not in the middle of a search."""
        kept: list[PartSpace] = []
        for p in self.parts:
            try:
                for form in forms(p):
                    make_parts(self.model, form.plan, blank=True)
                kept.append(p)
            except VeneerError as e:
                if not lenient:
                    raise
                self.left_out[p.name] = e.what
        self.parts = kept
        for plan in self.plans:
            make_parts(self.model, plan, blank=True)
        if not self.parts and not self.plans:
            raise ConfigError("the space is empty", where="space", fix="Give parts (methods with choices) or plans")
        if self.layers == "each" and not self.places:
            raise ConfigError("this model has no layers to switch", where="space.layers", fix="Set layers: all")


def _gate(members: list[Plan], per: str | None) -> Plan:
    def total(plans: list[Plan]) -> Plan:
        return plans[0] if len(plans) == 1 else Sum(tuple(plans))

    if per is None:
        return total(members)
    under = [m for m in members if all(t.method.gateable for t in m.terms())]
    outside = [m for m in members if m not in under]
    if not under:
        return total(members)
    made: Plan = gated(total(under), per=per)
    return total([made, *outside])


def _identity(s: Site) -> tuple[Any, ...]:
    return s.path, s.port, s.role, s.tensor, s.slice
