"""Veneer: thin trainable parts on a large frozen model. Every name here is loaded when it is first used."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from .registry import METHODS

__version__ = "0.1.0"

_WHERE = {
    "errors": ("VeneerError", "PlanError", "SiteError", "AdapterError", "CapabilityError", "MergeError", "StoreError", "ConfigError", "DataError"),
    "plan": ("Plan", "gated"),
    "compose.held": ("use", "frozen"),
    "compose.paced": ("paced",),
    "compose.mixture": ("mixture",),
    "compose.fusion": ("fuse",),
    "presets": ("preset",),
    "methods": ("methods", *METHODS),
    "sites": ("Site",),
    "resolve": ("sites",),
    "attach": ("attach", "detach"),
    "adapter": ("Adapter", "activate", "active", "disabled", "route", "prompted", "skip"),
    "merge": ("merge", "unmerge"),
    "combine": ("combine",),
    "store": ("save", "load"),
    "summary": ("summary",),
    "gates": ("gates",),
    "settle": ("settle",),
    "harden": ("harden",),
    "training": ("param_groups", "penalty", "advance"),
    "select.run": ("select",),
    "optimize": ("optimize", "unoptimize", "adamw"),
    "estimate": ("estimate", "Estimate"),
}  # fmt: skip
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Index(ModuleType):
    """`vn.attach` is the function, also after the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Index
