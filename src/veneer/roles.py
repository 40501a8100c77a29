"""What the maps of a block are for: groups of them that make attention, feed-forward layers and state-space mixers."""

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


@dataclass(eq=False)
class Feed:
    """One feed-forward layer; `block` is the sparse block round it where it is an expert, or a part of one."""

    up: Map
    gate: Map | None
    down: Map
    block: Node | None = None


@dataclass(eq=False)
class Mixer:
    """A state-space mixer or another recurrence."""

    owner: Node
    enter: Map
    out: Map


# -- attention --------------------------------------------------------------------------------------------------------
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


# -- feed-forward -----------------------------------------------------------------------------------------------------
def feeds(maps: list[Map], width: int, model_type: str) -> list[Feed]:
    """The feed-forward layers among the maps of one block that no attention or mixer uses, in model order."""
    found: list[Feed] = []
    free = [m for m in maps if not m.role and m.kind not in ("embedding", "conv")]
    owners: dict[Node, list[Map]] = {}
    for m in free:
        owners.setdefault(m.node if m.kind == "experts" else m.node.parent or m.node, []).append(m)
    for owner, group in owners.items():
        group = [m for m in group if not _routes(m, owner)]
        if not 2 <= len(group) <= 4:
            continue
        inner = 0 if group[0].kind == "experts" else width
        tries = [group, *([a, b] for i, a in enumerate(group) for b in group[i + 1 :] if len(group) > 2)]
        if (feed := next((f for g in tries if len(g) < 4 and (f := _fit(g, inner)) is not None), None)) is not None:
            found.append(feed)
            _name(feed, model_type)
    # E parallel matrices in modules of their own (Granite's input_linear and output_linear), and layers whose maps
    # stand in different modules (BERT's intermediate.dense and output.dense)
    _slide([m for m in free if not m.role], width, model_type, found)
    if not found:
        convs = [m for m in maps if not m.role and m.kind == "conv" and m.pointwise]
        _slide(convs, width, model_type, found)
    return found


def _slide(rest: list[Map], width: int, model_type: str, found: list[Feed]) -> None:
    i = 0
    while i < len(rest) - 1:
        for n in (3, 2):
            group = rest[i : i + n]
            if len(group) == n and len({m.kind == "experts" for m in group}) == 1 and (feed := _fit(group, width)) is not None:
                found.append(feed)
                _name(feed, model_type)
                i += n - 1
                break
        i += 1


def _routes(m: Map, owner: Node) -> bool:
    """Whether the map chooses experts: it stands beside them."""
    if words(m.name) not in F.ROUTER and m.name.lower() not in F.ROUTER:
        return False
    return any("expert" in c.name.lower() for c in owner.children if c is not m.node)


def _fit(group: list[Map], width: int) -> Feed | None:
    """`group` as up, down or as gate, up, down (in any order), or gate and up fused; None where shapes forbid it."""

    def closes(up: Map, down: Map) -> bool:
        return down.out == up.inp and (not width or up.inp == width)

    by = {w: m for m in group for w in [_word(m)]}
    down = next((m for m in group if _word(m) in F.DOWN and not (_word(m) == "wo" and "wi" not in " ".join(by))), None)
    order = [down] if down is not None else [group[-1], *group[:-1]]
    for last in order:
        others = [m for m in group if m is not last]
        if len(others) == 1 and closes(others[0], last) and others[0].out in (last.inp, 2 * last.inp):
            first = others[0]
            fused = first.out == 2 * last.inp
            return Feed(first, first if fused else None, last)
        if len(others) == 2 and all(closes(m, last) and m.out == last.inp for m in others):
            gate = next((m for m in others if _word(m) in F.GATE), others[0])
            if all(_word(m) in F.UP for m in others) is False and _word(others[0]) in F.UP and gate is others[0]:
                gate = others[1]
            up = next(m for m in others if m is not gate)
            return Feed(up, gate, last)
    return None if down is None else _fit_any(group, width, down)


def _fit_any(group: list[Map], width: int, tried: Map) -> Feed | None:
    """As `_fit`, where a name misled: the last map closes the layer."""
    last, others = group[-1], group[:-1]
    if last is tried or len(others) != 1:
        return None
    first = others[0]
    if last.out == first.inp and first.out == last.inp and (not width or first.inp == width):
        return Feed(first, None, last)
    return None


def _word(m: Map) -> str:
    return words(m.name) or m.name.lower()


def _name(feed: Feed, model_type: str) -> None:
    feed.down.role = "ffn.down"
    if feed.gate is None:
        feed.up.role = "ffn.up"
    elif feed.gate is not feed.up:
        feed.up.role, feed.gate.role = "ffn.up", "ffn.gate"
    else:
        fused, n = feed.up, feed.up.out
        fused.role, layout = "ffn.gate_up", F.GATE_UP.get(model_type, "gate_up")
        if _word(fused) == "up_gate":
            layout = "up_gate"
        if layout == "pairs":
            pieces = [("ffn.gate", Slice(n // 2, 2, 0, 1)), ("ffn.up", Slice(n // 2, 2, 1, 2))]
        else:
            names = ("ffn.up", "ffn.gate") if layout == "up_gate" else ("ffn.gate", "ffn.up")
            pieces = [(names[0], Slice(1, n, 0, n // 2)), (names[1], Slice(1, n, n // 2, n))]
        fused.parts = pieces


def expert_block(node: Node, root: Node) -> Node | None:
    """The sparse block round an expert's module: the parent of the outermost 'experts' under the layer."""
    chain = [n for n in node.up() if root.holds(n)]
    block = None
    for n in chain:
        if "expert" in n.name.lower() and n.parent is not None and root.holds(n.parent):
            block = n.parent
    return block


# -- mixers -----------------------------------------------------------------------------------------------------------
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
