"""Which maps of a model make an attention: q, k, v and o, by their names first and then by their shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import families as F
from .code import code_names
from .sites import Slice
from .structure import Map, Node, is_mha, subtree, words

EVIDENCE = re.compile(r"softmax|attention|attn|einsum|matmul|bmm")


@dataclass(eq=False)
class Attention:
    """q, k, v and o of one attention; `q`, `k`, `v` may be one fused map. `cross` attends to something else."""

    owner: Node
    q: Map
    k: Map
    v: Map
    o: Map | None
    cross: bool = False

    def maps(self) -> list[Map]:
        return [m for m in dict.fromkeys((self.q, self.k, self.v, self.o)) if m is not None]


def attentions(nodes: list[Node], model_type: str, config: Any) -> list[Attention]:
    """Every attention of the model, by names first and, in modules that clearly attend, by shapes."""
    found: list[Attention] = []
    used: set[Map] = set()
    named = [a for n in nodes if (a := _by_name(n)) is not None]
    for a in named:
        used.update(m for m in (a.q, a.k, a.v))
    for a in named:
        if a.o is None:
            a.o = _output(a, used)
        if a.o is not None:
            used.add(a.o)
    found += named
    for n in nodes:
        if not used.intersection(n.own()) and (a := _by_shape(n, used)) is not None:
            found.append(a)
            used.update(a.maps())
    for a in found:
        a.cross = _is_cross(a)
        _assign(a, model_type, config)
    return sorted(found, key=lambda a: a.owner.index)


def _by_name(n: Node) -> Attention | None:
    if is_mha(n):
        out = next((m for c in n.children for m in c.maps), None)
        if len(n.maps) == 1:
            return Attention(n, n.maps[0], n.maps[0], n.maps[0], out)
        return Attention(n, *n.maps, out) if len(n.maps) == 3 else None  # type: ignore[misc]
    by: dict[str, Map] = {}
    for m in (m for c in n.children for m in c.maps):
        if m.kind in ("embedding", "experts"):
            continue
        word, raw = words(m.name), m.name.lower()
        for role, table in (("q", F.Q), ("k", F.K), ("v", F.V), ("qkv", F.QKV), ("kv", F.KV), ("qk", F.QK)):
            if word in table or (role == "qkv" and raw in F.FUSED_NAMES):
                by.setdefault(role, m)
    fused = by.get("qkv")
    if fused is not None:
        if "q" in by and "k" not in by:  # GPT-2's cross-attention: c_attn holds k and v only
            return Attention(n, by["q"], fused, fused, None)
        return Attention(n, fused, fused, fused, None)
    if "q" in by and "kv" in by:
        return Attention(n, by["q"], by["kv"], by["kv"], None)
    if "qk" in by and "v" in by:
        return Attention(n, by["qk"], by["qk"], by["v"], None)
    if not {"q", "k", "v"} <= set(by):
        return None
    q, k, v = by["q"], by["k"], by["v"]
    # RWKV's channel mixing has a key, a receptance and a value too, but its value takes what its key gives
    return Attention(n, q, k, v, None) if k.inp == v.inp or q.out == k.out == v.out else None


def _output(a: Attention, used: set[Map]) -> Map | None:
    """The map that follows v: in the module itself, else in what stands beside it (BERT's attention.output.dense)."""
    taken = {a.q, a.k, a.v}
    here = [m for n in subtree(a.owner) for m in n.maps if m not in taken and m not in used and m.kind in _LINEAR]
    here = [m for m in here if not _SIDE.intersection(re.split(r"[_.]", m.name.lower()))]
    named = [m for m in here if words(m.name) in F.OUT or m.name.lower() in F.OUT or words(m.name) == ""]
    wide = a.v.out if a.v is not a.q and a.v is not a.k else None
    for options in (named, here):
        for m in options:
            if _fits(m, a, wide) and m.node.index - a.owner.index >= 0:
                return m
    if a.owner.parent is None:
        return None
    for sibling in a.owner.parent.children:
        if sibling is a.owner or sibling.index < a.owner.index:
            continue
        maps = [m for n in subtree(sibling) for m in n.maps if m.kind in _LINEAR]
        if maps:
            m = maps[0]
            return m if len(maps) == 1 and m not in used and _fits(m, a, wide) and m.out == a.q.inp else None
    return None


_LINEAR = ("linear", "transposed", "tensor", "conv")
_SIDE = F.Q | F.K | F.V  # Longformer's query_global and LUKE's w2e_query are no output projections


def _fits(m: Map, a: Attention, wide: int | None) -> bool:
    if not m.pointwise or m.out == 1:
        return False
    if m.out != a.q.inp and words(m.name) not in F.OUT and m.name.lower() not in F.OUT:
        return False
    if wide is None:  # fused
        return m.inp < a.q.out or a.q is not a.v
    return m.inp in (wide, a.q.out) or (wide > 0 and m.inp % wide == 0)


def _by_shape(n: Node, used: set[Map]) -> Attention | None:
    """Where names tell nothing: q, k, v, o in a row, or one of three times the width and one back."""
    if isinstance(n.module, nn.Sequential):
        return None
    maps = [m for c in n.children for m in c.maps if m not in used and m.kind in ("linear", "transposed")]
    if len(maps) < 2 or not _attends(n):
        return None
    for i in range(len(maps) - 1):
        a, b = maps[i], maps[i + 1]
        if a.out == 3 * a.inp and b.inp == b.out == a.inp:
            return Attention(n, a, a, a, b)
        if i + 3 < len(maps):
            c, d = maps[i + 2], maps[i + 3]
            d_in = a.inp == b.inp == c.inp and b.out == c.out and a.out == d.inp and d.out == a.inp
            if d_in and a.out % b.out == 0 and a.out <= 2 * a.inp and b.out <= a.inp:
                return Attention(n, a, b, c, d)
    return None


def _attends(n: Node) -> bool:
    if any(isinstance(c.module, nn.Softmax) for c in n.children):
        return True
    return any(EVIDENCE.search(name) for name in code_names(n.cls))


def _is_cross(a: Attention) -> bool:
    flag = a.owner.get("is_cross_attention", "is_cross", "cross_attention")
    if flag:
        return True
    if a.k.inp != a.q.inp and a.k.kind != "tensor" and words(a.q.name) != "q_b":
        return True
    node: Node | None = a.owner
    for _ in range(3):
        if node is None or node.name.isdigit():
            break
        flat = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", node.name).lower()
        if any(w in flat or w in node.name.lower() for w in F.CROSS):
            return True
        node = node.parent
    return False


def head_sizes(a: Attention, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim); zeros where nothing says them."""
    fused = a.q is a.v
    total = (a.o.inp if a.o is not None else a.q.out // 3) if fused else a.q.out
    heads = _said(a, config, F.HEADS)
    dim = _said(a, config, F.HEAD_DIM, only=True)
    if not dim and heads:
        base = a.o.inp if a.o is not None else total
        dim = base // heads if base % heads == 0 else 0
    if not dim:
        dim = _said(a, config, F.HEAD_DIM)
    if not dim:
        return 0, 0, 0
    if a.o is not None and a.o.inp % dim == 0:
        heads = a.o.inp // dim
    elif not heads or total % dim:
        heads = total // dim
    if fused:
        rest = a.v.out - heads * dim
        kv = rest // (2 * dim)
    elif a.k is a.v:
        kv = a.v.out // (2 * dim)
    else:
        kv = a.k.out // dim
    return heads, max(kv, 0), dim


def _said(a: Attention, config: Any, names: tuple[str, ...], only: bool = False) -> int:
    for node in (a.owner, a.owner.parent):
        if node is not None:
            value = node.get(*names)
            if value and value is not True:
                return value
    if only or config is None:
        return 0
    return next((v for n in names if isinstance(v := getattr(config, n, None), int) and v), 0)


def _assign(a: Attention, model_type: str, config: Any) -> None:
    """Roles, and the slices of what is fused."""
    stem = "cross" if a.cross else "attn"
    if a.o is not None:
        a.o.role = f"{stem}.o"
    if a.q is a.v:
        a.q.role = f"{stem}.qkv"
        a.q.parts = [(f"{stem}.{r}", s) for r, s in zip("qkv", fused_slices(a, model_type, config), strict=True) if s is not None]
        return
    a.q.role = f"{stem}.q"
    if a.k is a.v:
        a.k.role = f"{stem}.kv"
        nope, wide, heads = (a.owner.get(n) for n in ("qk_nope_head_dim", "v_head_dim", "num_heads"))
        if nope and wide and heads and heads * (nope + wide) == a.k.out:  # DeepSeek's latent attention
            a.k.parts = [(f"{stem}.k", Slice(heads, nope + wide, 0, nope)), (f"{stem}.v", Slice(heads, nope + wide, nope, nope + wide))]
        else:
            half = a.k.out // 2
            a.k.parts = [(f"{stem}.k", Slice(1, a.k.out, 0, half)), (f"{stem}.v", Slice(1, a.k.out, half, a.k.out))]
        return
    if a.q is a.k:
        a.q.role, half = f"{stem}.qk", a.q.out // 2
        a.q.parts = [(f"{stem}.q", Slice(1, a.q.out, 0, half)), (f"{stem}.k", Slice(1, a.q.out, half, a.q.out))]
        a.v.role = f"{stem}.v"
        return
    a.k.role, a.v.role = f"{stem}.k", f"{stem}.v"


def fused_slices(a: Attention, model_type: str, config: Any) -> list[Slice | None]:
    """Which rows of a fused map are q, k and v."""
    out = a.q.out
    layout = "qkv"
    for attribute, value, name in F.LAYOUTS.get(model_type, ()):
        if not attribute or getattr(config, attribute, None) == value:
            layout = name
            break
    heads, kv, dim = head_sizes(a, config)
    if layout == "heads" and dim:
        return [Slice(out // (3 * dim), 3 * dim, i * dim, (i + 1) * dim) for i in range(3)]
    if layout == "groups" and dim and kv:
        per = heads // kv
        ends = [(0, per), (per, per + 1), (per + 1, per + 2)]
        return [Slice(kv, (per + 2) * dim, i * dim, j * dim) for i, j in ends]
    if layout.startswith("mp:"):
        n = int(layout[3:])
        w = out // (3 * n)
        return [Slice(n, 3 * w, i * w, (i + 1) * w) for i in (0, 2, 1)]
    q = a.o.inp if a.o is not None and a.o.inp < out and (out - a.o.inp) % 2 == 0 else out // 3
    rest = (out - q) // 2
    return [Slice(1, out, 0, q), Slice(1, out, q, q + rest), Slice(1, out, q + rest, out)]
