"""The state of an adapted model: its hosts, its adapters, and which of them are in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .common import Shared
from .routing import Frame, Routing

if TYPE_CHECKING:
    from .host import Host


class State:
    """All that attaching has put on one model."""

    def __init__(self, model: nn.Module) -> None:
        self.hosts: dict[str, Host] = {}
        self.adapters: dict[str, Any] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.frame = Frame()
        self.merged: Any = None
        self.routable = False
        self.routings: list[Routing] = []  # those of nested vn.route, outermost first; the last one stays
        self.kinds: dict[frozenset[str], Any] = {}  # what routes of these adapters have in common (groups.py)
        self.shared = Shared()  # tensors of several adapters in one piece of memory
        self.ready: Callable[[Routing, bool], None] = lambda routing, goes_on: None  # set by vn.route
        self.trainable: dict[str, bool] = {}
        self.widened: Any = None  # a part whose state came once for all rows of a routed batch
        self.fuse: Callable[[], None] | None = None  # set by vn.optimize: gives hosts their bundles
        self.optimized: Callable[[], None] | None = None
        self.resting = False  # the base's weights are in CPU memory: see frozen.py
        self.undo: list[Callable[[], None]] = []

    def refresh(self) -> None:
        """Work out every host's recipe anew: after attach, detach or activate."""
        for routing in self.routings:
            routing.number = -1
            routing.recipes.clear()
        self.routings.clear()
        self.kinds.clear()
        for host in self.hosts.values():
            host.refresh()
        if self.fuse is not None:
            self.fuse()
