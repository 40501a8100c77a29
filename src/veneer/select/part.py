"""One method of a space, with several values for some of its options."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..plan import Plan, finite

# choose(name, options, ordered) -> the index of one of the options: a sampler, a walk over all, or a fixed rule
Choose = Callable[[str, Sequence[Any], bool], int]


@dataclass(frozen=True)
class PartSpace:
    """One method with several values for some of its options. A 0 for an option that is a whole number leaves it out."""

    name: str
    method: type[Any]
    fixed: dict[str, Any]
    choices: dict[str, list[Any]]
    optional: bool

    @property
    def switches(self) -> list[str]:
        """The options whose 0 leaves the part out."""
        hints = typing.get_type_hints(self.method)
        return [k for k, v in self.choices.items() if any(x == 0 and type(x) is int for x in v) and whole(hints.get(k))]

    @property
    def can_be_off(self) -> bool:
        return self.optional or bool(self.switches)

    @property
    def size(self) -> int:
        """How many forms it has, being left out not counted."""
        return math.prod(len(v) - (k in self.switches) for k, v in self.choices.items())

    def draw(self, choose: Choose, *, on: bool = False) -> Plan | None:
        """The method with one value for each option, or None for 'left out'; `on` rules that out."""
        if self.optional and not on and choose(self.name, (False, True), False) == 0:
            return None
        values = dict(self.fixed)
        for key in (*self.switches, *(k for k in self.choices if k not in self.switches)):
            options = [x for x in self.choices[key] if not (on and key in self.switches and x == 0)]
            found = options[0] if len(options) == 1 else options[choose(f"{self.name}.{key}", options, ascending(options))]
            if key in self.switches and found == 0:
                return None
            values[key] = found
        return self.method.from_fields(values, f"space.{self.name}")


@dataclass(frozen=True, order=True)
class Form:
    text: str
    plan: Any = field(compare=False)


def forms(part: PartSpace, most: int = 256) -> list[Form]:
    """The part in each of its forms; of very many, those with the first and the last choice of each option."""
    keys = list(part.choices)
    options = [[x for x in part.choices[k] if not (k in part.switches and x == 0)] for k in keys]
    if math.prod(map(len, options)) > most:
        options = [o if len(o) < 3 else [o[0], o[-1]] for o in options]
    plans = [part.method.from_fields(part.fixed | dict(zip(keys, v, strict=True)), f"space.{part.name}") for v in itertools.product(*options)]
    return [Form(str(p), p) for p in plans]


def whole(hint: Any) -> bool:
    return hint is int or int in typing.get_args(hint)


def ascending(options: Sequence[Any]) -> bool:
    numbers = [x for x in options if finite(x)]
    return len(numbers) == len(options) and numbers == sorted(numbers)
