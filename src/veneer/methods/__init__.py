"""The methods, each in its own file. `vn.methods()` shows those that registry.py lists; a class is loaded when used."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError, did_you_mean
from ..plan import short
from ..registry import METHODS
from .base import Method


def __getattr__(name: str) -> Any:
    if name not in METHODS:
        raise AttributeError(f"module 'veneer.methods' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{METHODS[name]}", __name__), name)


@functools.cache
def registered() -> tuple[type[Method], ...]:
    """Every method's class, in the registry's order."""
    return tuple(__getattr__(name) for name in METHODS)


@dataclass(frozen=True)
class Record:
    """A method as `vn.methods()` lists it; `capabilities` are those that it declares."""

    name: str
    family: str
    ports: tuple[str, ...]
    capabilities: tuple[str, ...]
    paper: str
    cls: type[Method]


CAPABILITIES = ("mergeable", "identity_at_init", "routable", "gateable", "needs_data")


def methods() -> list[Record]:
    """Every method: name, family, the ports it uses, what it can do, and its paper."""
    return [Record(m.name, m.family, m.ports, tuple(c for c in CAPABILITIES if getattr(m, c)), m.paper, m) for m in registered()]


def holder(form: str) -> Any:
    """The method that takes any numbers of this form on: 'tensor', one trained whole, or 'factors', a product B A."""
    return next(m for m in registered() if m.holds == form)


def find(name: Any, where: str = "") -> type[Method]:
    """The method class called `name`. Raises: PlanError with the nearest name."""
    for m in registered():
        if m.name == name:
            return m
    raise PlanError(f"there is no method {short(name)}", where=where, fix=did_you_mean(str(name), [m.name for m in registered()]))
