"""What methods share that put learnt keys and values before a sequence's: the positions that these may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..errors import CapabilityError
from ..ops.positions import tables
from ..sites import Site
from .base import Build, Method
from .part import Part, module_at
from .parts import TensorPart


class Cached(Method):
    """What methods share that put `length` keys and values before a sequence's, and may give them positions. No method itself."""

    length: int
    positions: bool

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        turned = []
        for site, part in super().parts(sites, build):
            if self.positions and _window(build.model, site):
                raise self._fail(
                    f"positions=True, and {site.path} has a sliding window that would leave the prefix behind",
                    "Leave positions out: every token then sees the prefix",
                )
            turned.append(part.turn is not None)  # type: ignore[attr-defined]
            yield site, part
        if not self.positions or all(turned):
            return
        paths = tables(build.model, sites("all", "weight", ""))
        if not paths or any(turned):
            raise self._fail(
                "positions=True, and this model has neither rotary positions nor a table of absolute ones",
                "Leave positions out: the prefix then takes no positions",
            )
        if build.gated:
            raise self._fail("positions=True moves the table of positions, which no gate can scale", "Leave positions out")
        for site in sites("all", "param", ""):
            if site.path in paths:
                yield site, ShiftPart(site, self.length)


def _window(model: nn.Module, site: Site) -> bool:
    module = module_at(model, site.path)
    own = module.__dict__.get("sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
    return bool(own) and getattr(getattr(module, "config", None), "use_sliding_window", True) is not False


class ShiftPart(TensorPart):
    """A table of absolute positions from row n on: position i is what i + n was."""

    def __init__(self, site: Site, n: int) -> None:
        super().__init__(site)
        self.n = n

    def value(self, p: Tensor) -> Tensor:
        if self.owner is not None and len(self.owner.now.get(self.site.tensor, ())) > 1:
            raise CapabilityError(
                f"a prefix with positions moves the table at {self.site.path!r}, which another active method changes too",
                fix="Activate one of them at a time",
            )
        return p[self.n :]
