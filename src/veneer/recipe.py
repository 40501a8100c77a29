"""Recipes: the parts that act in one module's call, and the cells that carry states to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .methods.part import Part


class Cell:
    """Carries a block's input from where it enters to where the block's state leaves."""

    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x: Tensor | None = None


class Tap(Cell):
    """Carries what enters another module to a part that acts later in the same call, without a gradient."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: Tensor | None = None

    @property
    def x(self) -> Tensor | None:  # type: ignore[override]
        return self.held

    @x.setter
    def x(self, value: Tensor | None) -> None:
        self.held = None if value is None else value.detach()


@dataclass
class Recipe:
    """The parts of the adapters in use that concern one host, sorted by what they do."""

    captures: list[Cell] = field(default_factory=list)
    inputs: list[Part] = field(default_factory=list)
    outputs: list[list[Part]] = field(default_factory=list)
    tensors: list[Part] = field(default_factory=list)
    kv: list[Part] = field(default_factory=list)
    embed: list[Part] = field(default_factory=list)
    memory: list[Part] = field(default_factory=list)
    bundle: Any = None  # fused.Bundle: runs the module and its first output stage in one operation
    place: int = 0
    later: list[list[Part]] = field(default_factory=list)  # the stages after the first
    alone: bool = False  # nothing but the slots acts here
    slots: Any = None  # slots.Slots: the first output stage of all rows of a routed batch

    def __bool__(self) -> bool:
        return any((self.captures, self.inputs, self.outputs, self.tensors, self.kv, self.embed, self.memory))
