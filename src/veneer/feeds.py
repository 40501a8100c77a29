"""Which maps of a block make a feed-forward layer, and what stands round an expert."""

from __future__ import annotations

from dataclasses import dataclass

from . import families as F
from .sites import Slice
from .structure import Map, Node, words


@dataclass(eq=False)
class Feed:
    """One feed-forward layer; `block` is the sparse block round it where it is an expert, or a part of one."""

    up: Map
    gate: Map | None
    down: Map
    block: Node | None = None


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
