"""Low-rank parts run together with their map, and with the maps that read the same input (query, key and value; gate
and up).

Only the plain case is taken: a linear with a frozen weight, and one ungated part that gives its `factors`. Anything
else keeps the general path in host.py, so a fused host needs no other branch for gates, rows or slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ops.lora import low_rank

if TYPE_CHECKING:
    from .host import Host
    from .methods.parts import Part
    from .recipe import Recipe

SHARED = ({"attn.q", "attn.k", "attn.v"}, {"cross.k", "cross.v"}, {"ffn.up", "ffn.gate"})


def fusible(host: Host, r: Recipe) -> Part | None:
    """The one part that can run inside this host's own product, if that is how the recipe is."""
    first = r.outputs[0] if r.outputs else []
    if r.inputs or r.kv or r.tensors or r.embed or r.memory or host.owned or len(first) != 1:
        return None
    part = first[0]
    if part.site.port != "weight" or part.site.kind != "linear" or part.site.slice is not None or part.gate is not None:
        return None
    return part if host.original is nn.Linear and getattr(part, "factors", None) is not None else None


class Member:
    """One map of a bundle: its module and the part that acts on it now."""

    __slots__ = ("module", "part")

    def __init__(self, module: nn.Module, part: Any) -> None:
        self.module, self.part = module, part


class Bundle:
    """Maps of one block that are given the same input, so that the first to be called answers for all.

    The others' results wait, with the input that they are for, until their own modules are called with that very
    tensor; called with another one, they are computed anew, and the bundle works map by map from then on.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.apart = False
        self.x: Tensor | None = None
        self.stamp: Any = None
        self.waiting: list[Tensor | None] = []

    def add(self, module: nn.Module, part: Any) -> int:
        self.members.append(Member(module, part))
        self.waiting.append(None)
        return len(self.members) - 1

    def call(self, i: int, x: Tensor) -> Tensor | None:
        """y of map i with its part, or None where the general path has to do it."""
        member = self.members[i]
        if x.dtype != member.module.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if len(self.members) == 1 or self.apart or (member.part.dropout and member.part.training):
            return self._run([member], x)[0]
        y = self.waiting[i]
        if y is not None and self.x is x and self.stamp == self._stamp(x):
            self.waiting[i] = None
            if all(w is None for w in self.waiting):
                self.x = self.stamp = None
            return y
        if self.x is not None:  # some map was not called with the input that the others had
            self.apart, self.x, self.stamp = True, None, None
            self.waiting = [None] * len(self.members)
            return self._run([member], x)[0]
        ys = self._run(self.members, x)
        self.x, self.stamp = x, self._stamp(x)
        y, ys[i] = ys[i], None
        self.waiting = ys
        return y

    def _stamp(self, x: Tensor) -> Any:
        """What must not have changed between the first call and the others. While a compiler traces, one graph holds
        them all."""
        if torch.compiler.is_compiling() or x.is_inference():
            return torch.is_grad_enabled()
        return torch.is_grad_enabled(), x._version, *(p._version for m in self.members for p in m.part.parameters(recurse=False))

    def _run(self, members: list[Member], x: Tensor) -> list[Any]:
        downs, ups, scales, dropped = [], [], [], None
        for m in members:
            a, b, s = m.part.factors(x)
            downs.append(a)
            ups.append(b)
            scales.append(s)
        if len(members) == 1:
            dropped = members[0].part.entry(x)
        ws, bs = [m.module.weight for m in members], [m.module.bias for m in members]
        return low_rank(x, ws, bs, downs, ups, scales, None if dropped is x else dropped)


def bundle(model: nn.Module, hosts: dict[str, Host]) -> None:
    """Give every host whose active recipe allows it its place in a bundle."""
    shared: dict[Any, Bundle] = {}
    for path, host in hosts.items():
        r = host.recipe
        if r is None:
            continue
        r.bundle = None
        part = fusible(host, r)
        if part is None:
            continue
        module = model.get_submodule(path)
        tensors = [p for p in (module.weight, module.bias) if p is not None]
        # quantised and sharded weights are tensors of other classes, whose products are not ours to write out
        if any(type(p) is not nn.Parameter or p.requires_grad for p in tensors):
            continue
        family = next((i for i, roles in enumerate(SHARED) if part.site.role in roles), path)
        b = shared.setdefault((path.rpartition(".")[0], family, part.site.inp, module.weight.dtype, module.weight.device), Bundle())
        r.bundle, r.place = b, b.add(module, part)
