"""Hosts: what an adapted module does in place of its own forward.

The order inside one call is: captures (who needs this input), input parts, the module itself (with tensor parts in
place of the base's tensors), output parts stage by stage. Module classes that lead here are in shells.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compose.gate import shape_like
from .ops.maps import place, take
from .recipe import Cell, Recipe
from .routing import Frame, Routing, Run, cut, folds, gate_of, shared_by_rows
from .tensors import first_of, needs_call, run_tensors, with_now

if TYPE_CHECKING:
    from .methods.part import Part
    from .state import State


class Host:
    """The changes that one module makes to its own call."""

    def __init__(self, path: str, module: nn.Module, state: State) -> None:
        self.path, self.state = path, state
        self.original = type(module)
        self.parts: list[Part] = []  # those that act in this module's call
        self.owned: dict[str, list[Part]] = {}  # tensor name -> parts that replace it
        self.captures: list[tuple[Part, Cell]] = []
        self.recipe: Recipe | None = None
        self.now: dict[str, list[Part]] = {}  # tensor parts in force when the tensor is read
        self.reading = False  # whether tensors are read in this module's call that parts may replace
        self.batch_dim = 0
        self.signature: inspect.Signature | None = None
        self.attention: Any = None  # how the module makes its attention call, where it has kv parts
        self.embedding: Any = None  # () -> the token embedding, where it has prompts
        self.memory_parts: list[Part] = []  # prompts in an encoder whose output this module attends to
        self.mixins: set[type] = set()
        self.prepared: list[Recipe | None] = []  # for the routings that vn.route has made, by their number
        self._routed: dict[tuple[str, ...], Recipe | None] = {}

    # -- recipes ------------------------------------------------------------------------------------------------------
    def refresh(self) -> None:
        self.prepared.clear()
        self._routed.clear()
        self.reading = any(p.acts == "tensor" for p in self.parts)
        self.recipe = self.make(self.state.active)
        self.now = {tensor: [p for p in parts if p.adapter in self.state.active and not needs_call(p)] for tensor, parts in self.owned.items()}

    def make(self, names: tuple[str, ...], routed: bool = False) -> Recipe | None:
        r = Recipe()
        stages: dict[tuple[bool, int], list[Part]] = {}
        for part, cell in self.captures:
            if part.adapter in names:
                r.captures.append(cell)
        for part in self.parts:
            if part.adapter not in names:
                continue
            if part.acts == "input":
                r.inputs.append(part)
            elif part.acts == "output":
                # a map's own parts before the parts of the block that it ends
                stages.setdefault((part.site.port == "hidden", part.stage), []).append(part)
            elif part.acts == "tensor":
                if routed or needs_call(part):
                    r.tensors.append(part)
            else:
                getattr(r, part.acts).append(part)
        r.memory = [p for p in self.memory_parts if p.adapter in names]
        r.outputs = [stages[k] for k in sorted(stages)]
        r.later = r.outputs[1:]
        return r if r else None

    def kv_now(self) -> list[Any]:
        """The kv parts in force in this call."""
        if not self.state.enabled:
            return []
        r = self.recipe_now(self.state.frame.routing)
        return r.kv if r is not None else []

    def recipe_now(self, routing: Routing | None) -> Recipe | None:
        if routing is None:
            return self.recipe
        if 0 <= routing.number < len(self.prepared):
            return self.prepared[routing.number]
        if self.path in routing.recipes:
            return routing.recipes[self.path]
        if routing.names not in self._routed:  # some rows by themselves
            self._routed[routing.names] = self.make(routing.names, routed=True)
        return self._routed[routing.names]

    # -- one call -----------------------------------------------------------------------------------------------------
    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.state
        if not state.enabled:
            return forward(*args, **kwargs)
        routing = state.frame.routing
        r = self.recipe_now(routing)
        if r is None:
            if routing is not None and self.reading:
                return with_now(self, [], forward, args, kwargs)
            return forward(*args, **kwargs)
        if r.alone and len(args) == 1 and not kwargs and state.frame.batch:
            return self.by_slots(r, forward, args[0], state.frame)
        return self.apply(r, forward, args, kwargs)

    def by_slots(self, r: Recipe, forward: Callable[..., Any], x: Tensor, frame: Frame) -> Any:
        """`apply` in a call within the model's, where slots are all that acts here."""
        slots, i = r.slots, r.place
        quick = slots.quick(i)
        if quick is None:
            y = slots.product(i, x, True)
            if y is not None:
                return y
        y = forward(x)
        if quick is not None and quick.takes(x, y):
            return quick.add(i, x, y)
        own = slots.call(i, x, y, True)
        return own if own is not None else self._outward(r.outputs[0], x, y, frame)

    def apply(self, r: Recipe, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self.state.frame
        if r.embed or r.memory:
            from .embed import run_embed

            return run_embed(self, r, forward, args, kwargs)
        x = first_of(args, kwargs)
        for cell in r.captures:
            cell.x = x
        if r.inputs:
            args, kwargs = _replace_first(args, kwargs, self._inward(r.inputs, x, frame))
        call, fused = forward, False
        if r.kv:
            from .attention import run_attention

            def call(*a: Any, **k: Any) -> Any:
                for cell in r.captures:
                    cell.x = first_of(a, k)
                return run_attention(self, r.kv, forward, a, k)

        if r.tensors or (frame.routing is not None and self.reading):
            y = run_tensors(self, r.tensors, x, call, args, kwargs, frame)
        else:
            y: Any = None
            if r.slots is not None:
                y = r.slots.product(r.place, x, frame.batch > 0)
            elif r.bundle is not None:
                y = r.bundle.call(r.place, x)
            fused = y is not None
            if not fused:
                y = call(*args, **kwargs)
        first = y if isinstance(y, Tensor) else y[0]
        own = r.slots.call(r.place, x, first, frame.batch > 0) if r.slots is not None and not fused else None
        stages = r.outputs if own is None and not fused else r.later
        if own is not None or stages:
            first = first if own is None else own
            for stage in stages:
                first = self._outward(stage, x, first, frame)
            y = first if isinstance(y, Tensor) else type(y)((first, *y[1:])) if isinstance(y, (tuple, list)) else _set_first(y, first)
        return y

    def _inward(self, parts: list[Part], x: Tensor, frame: Frame) -> Tensor:
        runs = self.runs(parts, x, frame)
        if runs is not None:
            return self._joined(runs, parts, [], x, frame, lambda own, _, piece, f: self._inward(own, piece, f))
        total, seen, stage = x, x, 0
        for part in sorted(parts, key=lambda p: p.stage):
            if part.stage != stage:
                seen, stage = total, part.stage
            total = self._add(total, part, lambda a, _, p=part: p.inward(a), seen, seen, frame, None)
        return total

    def _outward(self, parts: list[Part], x: Tensor, y: Tensor, frame: Frame) -> Tensor:
        xs = []
        for part in parts:
            xs.append(x if part.cell is None else y if part.cell.x is None else part.cell.x)
            if part.cell is not None:
                part.cell.x = None
        runs = self.runs(parts, y, frame)
        if runs is not None:
            return self._joined(runs, parts, xs, y, frame, self._summed)
        return self._summed(parts, xs, y, frame)

    def _summed(self, parts: list[Part], xs: list[Tensor], y: Tensor, frame: Frame) -> Tensor:
        total, joint = y, {}
        for part, x in zip(parts, xs, strict=True):
            if part.gate is not None and part.gate.joint is not None:
                joint.setdefault((part.adapter, part.gate.joint), []).append((part, x))
                continue
            total = self._add(total, part, part.deviation, x, y, frame, part.site.slice if part.site.port == "weight" else None)
        for (_, attend), members in joint.items():
            first, xin = members[0]
            mask = frame.mask if frame.routing is None else frame.routing.select(first.adapter, frame.mask)

            def rule(x: Tensor, h: Tensor, attend: Any = attend, members: Any = members, mask: Tensor | None = mask) -> Tensor:
                return attend(h, [p.deviation(x, h) for p, _ in members], [p.gate for p, _ in members], mask)

            total = self._add(total, first, rule, xin, y, frame, first.site.slice if first.site.port == "weight" else None)
        return total

    def runs(self, parts: list[Part], y: Tensor, frame: Frame) -> tuple[Run, ...] | None:
        """The runs of rows to which `parts` make a difference, where y can be cut in them: more than one."""
        routing = frame.routing
        if routing is None or y.dim() <= self.batch_dim or y.shape[self.batch_dim] % routing.size:
            return None
        runs = routing.runs(p.adapter for p in parts)
        return runs if runs is not None and len(runs) > 1 else None

    def _joined(self, runs: tuple[Run, ...], parts: list[Part], xs: list[Tensor], y: Tensor, frame: Frame, rule: Callable[..., Tensor]) -> Tensor:
        """rule(parts, xs, y, frame) in each run of rows that has parts, joined again."""
        dim, n, routing = self.batch_dim, y.shape[self.batch_dim], frame.routing
        assert routing is not None
        pieces: dict[int, list[Tensor]] = {id(t): cut(t, runs, routing.size, n, dim) for t in xs}
        out = list(cut(y, runs, routing.size, n, dim))
        for i, run in enumerate(runs):
            own = [j for j, p in enumerate(parts) if p.adapter in run.names]
            if own:
                x = [pieces[id(xs[j])][i] for j in own] if xs else []
                out[i] = rule([parts[j] for j in own], x, out[i], routing.frame(frame, run))
        return torch.cat(out, dim)

    def _add(self, total: Tensor, part: Part, rule: Callable[..., Tensor], x: Tensor, y: Tensor, frame: Frame, s: Any) -> Tensor:
        """total + g · rule(x, y), in the rows that use the part and in the features of the slice."""
        if part.idle():
            return total
        dim = self.batch_dim
        rows, mask, prompt = None, frame.mask, frame.prompt
        if frame.routing is not None:
            n = total.shape[dim]
            n = frame.routing.size if n == 1 else n
            # positions and the like come once for all rows
            if total.shape[dim] == 1 < n:
                self.state.widened = part
            total, x, y = (t.expand(*t.shape[:dim], n, *t.shape[dim + 1 :]) if t.shape[dim] == 1 else t for t in (total, x, y))
            rows = self.rows(part, n, total.device, frame)
            if rows is not None:
                if rows.numel() == 0:
                    return total
                x = x.index_select(dim, rows) if x.shape[dim] == n else x
                y = y.index_select(dim, rows)
                mask, prompt = (frame.routing.select(part.adapter, t) for t in (mask, prompt))
        out_dim = part.map.out_dim if part.site.port == "weight" else -1
        d = rule(x, take(y, s, out_dim))
        if part.gate is not None and part.gate.joint is None:
            width_last = not (part.site.port == "weight" and part.map.out_dim == 1)
            d = d * self.gate(part, part.sees(x, y), d, frame, mask, folds(total.shape[dim], frame), width_last)
        if part.places is not None:
            d = d * self._shaped(part.places(d.shape[1 - dim], mask, prompt, int(frame.past), d), d)
        d = place(d, s, out_dim).to(total.dtype)
        return total + d if rows is None else total.index_add(dim, rows, d)

    def gate(self, part: Part, x: Tensor, d: Tensor, frame: Frame, mask: Tensor | None, fold: int, width_last: bool = True) -> Tensor:
        """The gate of `part` for input x, shaped to multiply d."""
        g = gate_of(part, x if x.is_floating_point() else d, frame, mask, self.batch_dim, fold)
        return self._shaped(g, d, width_last)

    def _shaped(self, g: Tensor, d: Tensor, width_last: bool = True) -> Tensor:
        if self.batch_dim == 1:
            g = shape_like(g, d.transpose(0, 1))
            return g.transpose(0, 1) if g.dim() > 1 else g
        return shape_like(g, d, width_last=width_last)

    # -- tensors ------------------------------------------------------------------------------------------------------
    def tensor(self, name: str, p: Tensor) -> Tensor:
        """The tensor that stands for the base's parameter p now."""
        parts = self.now.get(name)
        if not parts or not self.state.enabled:
            return p
        total = p
        for part in parts:
            v = part.value(p)
            if part.gate is not None:
                v = p + part.gate(None, self.state.frame).to(p.dtype) * (v - p)
            elif len(parts) == 1:
                return v
            total = total + (v - p)
        return total

    def rows(self, part: Part, n: int, device: Any, frame: Frame) -> Tensor | None:
        """The rows of a batch of n that use the part; None for all. Raises: CapabilityError where rows share a state."""
        if frame.routing is None:
            return None
        if n % frame.routing.size and frame.batch and frame.batch % frame.routing.size == 0:
            raise shared_by_rows(part)
        return frame.routing.rows(part.adapter, n, device)


def _replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            return (*args[:i], x, *args[i + 1 :]), kwargs
    for key, a in kwargs.items():
        if isinstance(a, Tensor):
            return args, {**kwargs, key: x}
    return args, kwargs


def _set_first(y: Any, first: Tensor) -> Any:
    key = next(iter(y.keys()))  # a ModelOutput
    y[key] = first
    return y
