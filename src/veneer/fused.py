"""Low-rank parts run together with their map, and with the maps that read the same input (query, key and value; gate
and up).

Only the plain case is taken: a linear with a frozen weight, and one part that gives its `factors`, under a gate of its own or none, or
`gains` for the whole output. Anything else keeps the general path in host.py, so a fused host needs no other branch for rows or slices.
Maps that share an input share one dropout mask: each of them drops as many numbers as ever, but the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import autocasting
from .ops import fp8_lora
from .ops.lora import low_rank
from .routing import folds

if TYPE_CHECKING:
    from .host import Host
    from .methods.part import Part
    from .recipe import Recipe

SHARED = ({"attn.q", "attn.k", "attn.v"}, {"cross.k", "cross.v"}, {"ffn.up", "ffn.gate"})


def fusible(host: Host, r: Recipe) -> Part | None:
    """The one part that can run inside this host's own product, if that is how the recipe is."""
    first = r.outputs[0] if r.outputs else []
    if r.inputs or r.kv or r.tensors or r.embed or r.memory or host.owned or len(first) != 1:
        return None
    part = first[0]
    if part.site.port != "weight" or part.site.kind != "linear" or part.site.slice is not None or part.places is not None:
        return None
    gains = getattr(part, "gains", None)
    if part.gate is not None and (part.gate.joint is not None or gains is not None):
        return None
    return part if gains is not None or getattr(part, "factors", None) is not None else None


def own_product(host: Host, module: nn.Module) -> bool:
    """Whether the host's product is ours to write out: not that of quantised and sharded weights, which are tensors of other
    classes, nor of trained ones, nor one in another arithmetic (frozen.py)."""
    return "_veneer_product" not in module.__dict__ and frozen_linear(host, module)


def frozen_linear(host: Host, module: nn.Module) -> bool:
    tensors = [p for p in module._parameters.values() if p is not None]
    return host.original is nn.Linear and all(type(p) is nn.Parameter and not p.requires_grad for p in tensors)


class Member:
    """One map of a bundle: its host and module, and the part that acts on it now."""

    __slots__ = ("host", "module", "part")

    def __init__(self, host: Host, module: nn.Module, part: Any) -> None:
        self.host, self.module, self.part = host, module, part

    def dropout(self) -> float:
        return self.part.dropout if self.part.training else 0.0

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """A, B, s, and what the map's whole output is multiplied by."""
        part = self.part
        if getattr(part, "gains", None) is None:
            return *part.factors(x), None
        a, b = part.pair()
        return part.cast(a, x), part.cast(b, x), part.scale, part.gains(a, b)

    def gate(self, x: Tensor) -> Tensor | None:
        if self.part.gate is None:
            return None
        frame = self.host.state.frame
        return self.host.gate(self.part, x, x, frame, frame.mask, folds(x.shape[self.host.batch_dim], frame)).to(x.dtype)


class Together:
    """Maps of one block that are given the same input, so that the first to be called answers for all.

    The others' results wait, with the input that they are for, until their own modules are called with that very
    tensor; called with another one, they are computed anew, and each works by itself from then on.
    """

    def __init__(self) -> None:
        self.apart = False
        self.x: Tensor | None = None
        self.stamp: Any = None
        self.waiting: list[Tensor | None] = []

    def join(self) -> int:
        """One more map; return its number."""
        self.waiting.append(None)
        return len(self.waiting) - 1

    def answer(self, i: int, x: Tensor, alone: bool) -> Tensor:
        """The result of map i for x."""
        if len(self.waiting) == 1 or self.apart or alone:
            return self.run([i], x)[0]
        y = self.waiting[i]
        if y is not None and self.x is x and self.stamp == self._stamp(x):
            self.waiting[i] = None
            if all(w is None for w in self.waiting):
                self.x = self.stamp = None
            return y
        if self.x is not None:  # some map was not called with the input that the others had
            self.apart, self.x, self.stamp = True, None, None
            self.waiting = [None] * len(self.waiting)
            return self.run([i], x)[0]
        ys: list[Any] = self.run(list(range(len(self.waiting))), x)
        self.x, self.stamp = x, self._stamp(x)
        y, ys[i] = ys[i], None
        self.waiting = ys
        return y

    def _stamp(self, x: Tensor) -> Any:
        """What must not have changed between the first call and the others. While a compiler traces, one graph holds
        them all."""
        if torch.compiler.is_compiling() or x.is_inference():
            return torch.is_grad_enabled()
        return torch.is_grad_enabled(), x._version, self.state()

    def state(self) -> Any:
        """What the results depend on besides x."""
        raise NotImplementedError

    def run(self, which: list[int], x: Tensor) -> list[Tensor]:
        """The results of the maps `which` for x."""
        raise NotImplementedError


class Bundle(Together):
    """Maps with their parts in one operation."""

    def __init__(self, fp8: bool = False) -> None:
        super().__init__()
        self.members: list[Member] = []
        self.fp8 = fp8  # the base's products are in it

    def add(self, host: Host, module: nn.Module, part: Any) -> int:
        self.members.append(Member(host, module, part))
        return self.join()

    def call(self, i: int, x: Tensor) -> Tensor | None:
        """y of map i with its part, or None where the general path has to do it."""
        member = self.members[i]
        if x.dtype != member.module.weight.dtype or autocasting(x):
            return None
        if self.fp8 and member.module.__dict__["_veneer_product"].weight.w.device != x.device:
            return None  # moved since
        p = member.dropout()
        # sums that gates keep with a cache go on in each map's own call
        kept = member.host.state.frame.memo is not None and any(m.part.gate is not None for m in self.members)
        return self.answer(i, x, kept or any(m.dropout() != p for m in self.members))

    def state(self) -> Any:
        return tuple(p._version for m in self.members for p in m.part.parameters())

    def run(self, which: list[int], x: Tensor) -> list[Any]:
        members = [self.members[i] for i in which]
        downs, ups, scales, gains = zip(*[m.factors(x) for m in members], strict=True)
        cs = [m.module.bias for m in members]
        if self.fp8:
            dropped = members[0].part.entry(x)
            ws = [m.module.__dict__["_veneer_product"].weight for m in members]
            return fp8_lora.low_rank(x, ws, cs, downs, ups, scales, None if dropped is x else dropped)
        ws = [m.module.weight for m in members]
        return low_rank(x, ws, cs, downs, ups, scales, members[0].dropout(), gates=[m.gate(x) for m in members], gains=gains)

    def sizes(self) -> tuple[int, tuple[int, ...], int]:
        """(in, outs, the rank of each) of its maps."""
        sites = [m.part.site for m in self.members]
        return sites[0].inp, tuple(s.out for s in sites), self.members[0].part.pair()[0].shape[0]


def bundle(model: nn.Module, hosts: dict[str, Host], fp8: bool = False) -> None:
    """Give every host whose active recipe allows it its place in a bundle; with `fp8`, those too whose base computes in it."""
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
        own = "_veneer_product" in module.__dict__
        if (own and (not fp8 or part.gate is not None or getattr(part, "gains", None) is not None)) or not frozen_linear(host, module):
            continue
        family = next((i for i, roles in enumerate(SHARED) if part.site.role in roles), path)
        b = shared.setdefault((path.rpartition(".")[0], family, part.site.inp, module.weight.dtype, module.weight.device, own), Bundle(own))
        r.bundle, r.place = b, b.add(host, module, part)
    for b in shared.values():
        device = b.members[0].module.__dict__["_veneer_product"].weight.w.device if b.fp8 else None
        if device is not None and device.type == "cuda":
            fp8_lora.measured(device, [b.sizes()])
