"""The registry: one line a method. `vn.methods()` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import PlanError, did_you_mean
from ..plan import short
from .base import Method
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .full import Full
from .ia3 import IA3
from .lora import LoRA
from .prefix import Prefix
from .prompt import PromptTuning

REGISTRY: tuple[type[Method], ...] = (
    LoRA,
    IA3,
    BitFit,
    Bottleneck,
    Prefix,
    PromptTuning,
    Full,
)


@dataclass(frozen=True)
class Record:
    """A method as `vn.methods()` lists it; `capabilities` are those that it declares."""

    name: str
    family: str
    ports: tuple[str, ...]
    capabilities: tuple[str, ...]
    paper: str
    cls: type[Method]


CAPABILITIES = ("mergeable", "identity_at_init", "routable", "gateable")


def methods() -> list[Record]:
    """Every method: name, family, the ports it uses, what it can do, and its paper."""
    return [Record(m.name, m.family, m.ports, tuple(c for c in CAPABILITIES if getattr(m, c)), m.paper, m) for m in REGISTRY]


def find(name: Any, where: str = "") -> type[Method]:
    """The method class called `name`. Raises: PlanError with the nearest name."""
    for m in REGISTRY:
        if m.name == name:
            return m
    raise PlanError(f"there is no method {short(name)}", where=where, fix=did_you_mean(str(name), [m.name for m in REGISTRY]))
