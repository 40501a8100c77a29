"""Which maps of a model make a state-space mixer, or another recurrence."""

from __future__ import annotations

from dataclasses import dataclass

from .structure import Map, Node


@dataclass(eq=False)
class Mixer:
    """A state-space mixer or another recurrence."""

    owner: Node
    enter: Map
    out: Map


def mixer_of(n: Node, taken: set[Map]) -> Mixer | None:
    """A state-space mixer: a depthwise convolution over time or a decay of its own, between an 'in' and an 'out' map."""
    maps = [m for m in n.own() if m not in taken]
    linear = [m for m in maps if m.kind in ("linear", "transposed")]
    runs = any(p in n.module._parameters for p in ("A_log", "dt_bias", "time_decay", "A")) or any(
        m.kind == "conv" and not m.pointwise and getattr(m.node.module, "groups", 1) > 1 and len(m.node.module.kernel_size) == 1  # type: ignore[arg-type]
        for m in maps
    )
    if not runs or len(linear) < 2:
        return None
    out = next((m for m in linear if "out" in m.name.lower().split("_")), None)
    enter = next((m for m in linear if m is not out and out is not None and m.inp == out.out), None)
    if out is None or enter is None:
        return None
    for m in linear:
        parts = m.name.lower().split("_")
        short = next((w for w in ("in", "out", "x", "dt", "y") if w in parts), "")
        m.role = f"mixer.{short}" if short else "mixer.in" if m.inp == enter.inp else ""
    return Mixer(n, enter, out)
