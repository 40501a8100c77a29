"""The skeleton of a model: its modules as a tree, the maps among them, and the layers they repeat in.

Adapters that are attached already are not part of it: children and parameters called `_veneer…` are passed over.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from . import families as F
from .code import own_class

HIDDEN = "_veneer"
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(eq=False)
class Map:
    """y = Wx + b: `kind`, the parameter's name and the sizes, as in `Site`. `role` and `parts` come later."""

    node: Node
    kind: str
    tensor: str
    out: int
    inp: int
    experts: int = 0
    transposed: bool = False
    pointwise: bool = True
    role: str = ""
    parts: list[tuple[str, Any]] = field(default_factory=list)  # (role, Slice) of a fused map

    @property
    def name(self) -> str:
        """What the map is called: of a parameter, its own name; of a module, its last name that is not a number."""
        if self.kind in ("experts", "tensor") and self.tensor != "weight":
            return self.tensor
        return self.node.label


@dataclass(eq=False)
class Node:
    """A module in the tree."""

    path: str
    name: str
    module: nn.Module
    cls: type
    parent: Node | None
    index: int = 0
    children: list[Node] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    count: int = 0  # maps in and under it
    end: int = 0  # nodes of its subtree are index .. end - 1

    @property
    def label(self) -> str:
        node: Node | None = self
        while node is not None and node.name.isdigit():
            node = node.parent
        return node.name if node is not None else ""

    def up(self) -> Iterator[Node]:
        """Itself and its ancestors, innermost first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def holds(self, other: Node) -> bool:
        return self.index <= other.index < self.end

    def own(self) -> list[Map]:
        """The maps that are its own or its direct children's."""
        return [*self.maps, *(m for c in self.children for m in c.maps)]

    def get(self, *names: str) -> Any:
        """The first attribute called one of `names` that is an int or a bool."""
        for name in names:
            value = self.module.__dict__.get(name)
            if isinstance(value, int):
                return value
        return None


@lru_cache(maxsize=4096)
def words(name: str) -> str:
    """`name` in lower case without the noise: 'W_q' and 'q_proj' give 'q', 'Wqkv' 'wqkv', 'dense' ''."""
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_")
    kept = [p for p in parts if p and p not in F.NOISE]
    return "_".join(kept)


def tree(model: nn.Module) -> list[Node]:
    """All modules, parents before children; a module that is used at several places stands at the first."""
    nodes: list[Node] = []
    seen: set[int] = set()

    def visit(path: str, name: str, module: nn.Module, parent: Node | None) -> None:
        seen.add(id(module))
        node = Node(path, name, module, own_class(module), parent, len(nodes))
        nodes.append(node)
        if parent is not None:
            parent.children.append(node)
        node.maps = maps_of(node)
        for child_name, child in module._modules.items():
            if child is not None and not child_name.startswith(HIDDEN) and id(child) not in seen:
                visit(f"{path}.{child_name}" if path else child_name, child_name, child, node)
        node.end = len(nodes)
        node.count = len(node.maps) + sum(c.count for c in node.children)

    visit("", "", model, None)
    return nodes


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules() without going through what is attached, so that an adapter more costs what the first did."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        inner = [(f"{path}.{n}" if path else n, m) for n, m in module._modules.items() if m is not None and n != HIDDEN]
        todo += reversed(inner)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """model.named_parameters() likewise."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{path}.{name}" if path else name, p


def maps_of(node: Node) -> list[Map]:
    """The maps that the module itself applies, told by what it has and not by its class."""
    m = node.module
    weight = m._parameters.get("weight")
    names = m.__dict__
    if is_mha(node):
        d: Any = m.embed_dim
        if m._parameters.get("in_proj_weight") is not None:
            return [Map(node, "tensor", "in_proj_weight", 3 * d, d)]
        found = [(t, m._parameters.get(t)) for t in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        return [Map(node, "tensor", t, p.shape[0], p.shape[1]) for t, p in found if p is not None]
    inp = next((names[k] for k in F.WIDTHS[0] if isinstance(names.get(k), int)), None)
    out = next((names[k] for k in F.WIDTHS[1] if isinstance(names.get(k), int)), None)
    if inp is not None and out is not None and not (weight is not None and weight.dim() == 3):
        # MultiheadAttention reads its output projection's weight and never calls it
        inside = node.parent is not None and is_mha(node.parent)
        return [Map(node, "tensor" if inside else "linear", "weight", out, inp)]
    if isinstance(names.get("kernel_size"), tuple) and "in_channels" in names:
        if names.get("transposed") or len(names["kernel_size"]) > 3:
            return []
        size = math.prod(names["kernel_size"])
        inp = names["in_channels"] // names["groups"] * size
        return [Map(node, "conv", "weight", names["out_channels"], inp, pointwise=size == 1 and names["groups"] == 1)]
    if isinstance(names.get("num_embeddings"), int) and "embedding_dim" in names:
        return [Map(node, "embedding", "weight", names["embedding_dim"], names["num_embeddings"])]
    if isinstance(names.get("nf"), int) and weight is not None and weight.dim() == 2:
        return [Map(node, "transposed", "weight", weight.shape[1], weight.shape[0])]
    found3 = [(t, p) for t, p in m._parameters.items() if isinstance(p, Tensor) and p.dim() == 3 and p.shape[0] > 1 and p.shape[1] > 1]
    return experts_of(node, found3) if found3 else []


def is_mha(node: Node) -> bool:
    m = node.module
    return "in_proj_weight" in m._parameters and "out_proj" in m._modules and "embed_dim" in m.__dict__


def experts_of(node: Node, found: list[tuple[str, Tensor]]) -> list[Map]:
    """3-D parameters E x out x in of one module: an up (and gate) map, a down map."""
    names = dict(found)
    flipped = getattr(node.module, "is_transposed", None)
    down = next((t for t in names if words(t).split("_")[0] in ("down", "w2", "output", "wo")), None)
    single = len(names) == 1 and "weight" in names and any(w in words(node.label).split("_") for w in ("input", "output", "up", "down", "gate"))
    if down is None and not single:
        return []
    maps = []
    for t, p in found:
        e, a, b = p.shape
        turned = bool(flipped) if flipped is not None else False
        if flipped is None and down is not None and t != down:
            d = names[down].shape
            # (E, 2I, D) with (E, D, I), or (E, D, 2I) with (E, I, D)
            turned = a == d[2] and b in (d[1], 2 * d[1]) and not (b == d[1] and a in (d[2], 2 * d[2]))
        elif flipped is None and down is not None:
            other = next((q.shape for u, q in found if u != down), p.shape)
            turned = other[1] == b and other[2] in (a, 2 * a) and not (other[2] == a and other[1] in (b, 2 * b))
        out, inp = (b, a) if turned else (a, b)
        maps.append(Map(node, "experts", t, out, inp, experts=e, transposed=turned))
    return maps


# -- layers -----------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Layer:
    root: Node
    nested: bool  # stacks in stacks, as in Swin
    also: list[Node] = field(default_factory=list)  # modules of the same layer in lists beside its stack, as XLM's ffns
    tower: str = ""
    number: int = 0
    width: int = 0


def layer_roots(nodes: list[Node], cores: list[Node]) -> dict[Node, bool]:
    """The repeated blocks that hold the `cores` (attention, mixers): root -> whether its stack is one of several.

    A stack is the innermost list round a core whose members repeat a class. T5's block.layer, a list of three different
    modules, is no stack; Swin's stages are lists of stacks.
    """
    stacks: dict[Node, None] = {}
    alone: list[Node] = []
    for core in cores:
        lists = [n.parent for n in core.up() if n.parent is not None and isinstance(n.parent.module, LISTS)]
        pick = next((c for c in lists if repeats(c)), lists[0] if lists and not single_block(lists[0]) else None)
        if pick is not None:
            stacks[pick] = None
        else:
            alone.append(core)
    roots: dict[Node, bool] = {}
    for stack in stacks:
        nested = any(isinstance(n.module, LISTS) and repeats(n) and len(n.children) > 1 for n in stack.up() if n is not stack)
        for child in stack.children:
            if child.count > 1:
                roots[child] = nested
    for core in alone:
        if any(r.holds(core) for r in roots):
            continue
        roots[block_of(core, cores)] = False
    return dict(sorted(roots.items(), key=lambda kv: kv[0].index))


def beside(layers: list[Layer]) -> None:
    """Find what belongs to each layer in lists that run parallel to its stack (XLM: attentions, layer_norm1, ffns)."""
    stacks: dict[Node, list[Layer]] = {}
    for layer in layers:
        if layer.root.parent is not None and isinstance(layer.root.parent.module, LISTS):
            stacks.setdefault(layer.root.parent, []).append(layer)
    for stack, members in stacks.items():
        for other in stack.parent.children if stack.parent is not None else []:
            if other in stacks or not isinstance(other.module, nn.ModuleList) or len(other.children) != len(members):
                continue
            if len(members) > 1 and len(stack.children) == len(members):
                for layer, child in zip(members, other.children, strict=True):
                    layer.also.append(child)


def repeats(stack: Node) -> bool:
    kids = [c.cls for c in stack.children if c.count > 1]
    return bool(kids) and (len(stack.children) == 1 or max(Counter(kids).values()) > 1)


def single_block(stack: Node) -> bool:
    """Whether a list holds the pieces of one block (norm, attention, feed-forward) rather than blocks."""
    return len({c.cls for c in stack.children}) == len(stack.children) and stack.parent is not None


def block_of(core: Node, cores: list[Node]) -> Node:
    """The block round a core that is in no list: the outermost module with a sibling like it, or the smallest one that
    has more than the core."""
    chain = [n for n in core.up()]
    for node in reversed(chain[1:]):
        if node.parent is not None and any(s is not node and s.cls is node.cls and any(s.holds(c) for c in cores) for s in node.parent.children):
            return node
    for node in chain:
        if sum(1 for n in subtree(node) for m in n.maps if m.kind != "embedding" and not m.role) >= 2:
            return node
    return chain[min(1, len(chain) - 1)]


def subtree(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from subtree(child)
