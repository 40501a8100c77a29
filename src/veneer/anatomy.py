"""The anatomy of a model: its attentions, mixers, feed-forward layers, blocks, towers, head and embeddings, from its structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import families as F
from .code import code_names
from .feeds import Feed, expert_block, feeds
from .mixers import Mixer, mixer_of
from .roles import Attention, attentions
from .structure import Layer, Node, beside, is_mha, layer_roots, subtree, tree


class Anatomy:
    """What `model` is made of. Nothing of the model is changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nodes = tree(model)
        self.at = {n.path: n for n in self.nodes}
        self.configs = {n: c for n in self.nodes if (c := n.module.__dict__.get("config")) is not None}
        self.config = getattr(model, "config", None) or next(iter(self.configs.values()), None)
        self.model_type = str(getattr(self.config, "model_type", ""))
        self.attn: list[Attention] = []
        self.mixers: list[Mixer] = []
        self.feeds: list[tuple[Feed, Layer]] = []
        self._cores()
        self._layers()
        self._feeds()
        self.head = self._head()
        self._towers()
        self._embeddings()

    def config_of(self, node: Node) -> Any:
        return next((self.configs[n] for n in node.up() if n in self.configs), self.config)

    # -- reading ------------------------------------------------------------------------------------------------------
    def _cores(self) -> None:
        self.attn = attentions(self.nodes, self.model_type, self.config)
        taken = {m for a in self.attn for m in a.maps()}
        for n in self.nodes:
            if (mixer := mixer_of(n, taken)) is not None:
                self.mixers.append(mixer)

    def _layers(self) -> None:
        cores = [a.owner for a in self.attn] + [m.owner for m in self.mixers]
        if not cores:  # blocks without attention: whatever repeats and has two maps or more
            cores = [n for n in self.nodes if n.count > 1 and not any(c.count > 1 for c in n.children)]
            cores = [n for n in cores if any(p.parent is not None and isinstance(p.parent.module, (nn.ModuleList, nn.Sequential)) for p in n.up())]
        roots = layer_roots(self.nodes, sorted(cores, key=lambda n: n.index))
        self.layers = [Layer(root, nested) for root, nested in roots.items()]
        beside(self.layers)
        self.layer_of: dict[Node, Layer] = {}
        for layer in self.layers:
            for top in (*layer.also, layer.root):
                for n in self.nodes[top.index : top.end]:
                    self.layer_of[n] = layer

    def _feeds(self) -> None:
        widths: dict[Layer, int] = {}
        for a in self.attn:
            if (layer := self.layer_of.get(a.owner)) is not None:
                widths.setdefault(layer, a.o.out if a.o is not None else a.q.inp)
        for m in self.mixers:
            if (layer := self.layer_of.get(m.owner)) is not None:
                widths.setdefault(layer, m.out.out)
        for layer in self.layers:
            tops = sorted((layer.root, *layer.also), key=lambda n: n.index)
            maps = [m for top in tops for n in self.nodes[top.index : top.end] for m in n.maps]
            outside = [m for m in maps if not any(a.owner.holds(m.node) for a in self.attn) and m.kind in ("linear", "transposed", "experts")]
            if len(outside) > 1:  # else the block is written flat, and its attention's module holds it all
                maps = [m for m in maps if m in outside or m.kind == "conv"]
            layer.width = widths.get(layer, 0)
            for feed in feeds(maps, layer.width, self.model_type):
                block = expert_block(feed.down.node, layer.root)
                if block is None and feed.down.kind == "experts":
                    block = feed.down.node.parent
                feed.block = block
                self.feeds.append((feed, layer))
                layer.width = layer.width or feed.down.out
        # a shared expert stands in the sparse block too: its output is only a part of the block's
        sparse = {f.block for f, _ in self.feeds if f.block is not None}
        for f, _ in self.feeds:
            if f.block is None:
                f.block = next((n for n in f.down.node.up() if n in sparse), None)
        for n in self.nodes:
            for m in n.maps:
                if not m.role and m.kind == "linear" and n in self.layer_of and in_router(n):
                    m.role = "router"

    def _head(self) -> set[Node]:
        """Nodes of what stands outside the base model."""
        head: set[Node] = set()
        holders = {n for layer in self.layers for n in layer.root.up()}
        node: Node | None = self.nodes[0]
        while node is not None:
            base = self._base(node)
            after = False
            for child in node.children:
                inside = child in holders
                after = after or inside
                if inside or (child in self.layer_of and not self._flat(node)):
                    continue
                if base is not None:
                    out = child is not base
                elif hasattr(node.cls, "base_model_prefix"):
                    out = after and child.name.lower() in F.HEAD
                elif "norm" in child.cls.__name__.lower() or child.count == 0:
                    out = False
                else:
                    kinds = {m.kind for n in subtree(child) for m in n.maps}
                    out = (after or child.name.lower() in F.HEAD) and bool(kinds & {"linear", "transposed", "conv"})
                    out = out and not any(m.role for n in subtree(child) for m in n.maps) and "pool" not in child.name.lower()
                if out:
                    head.update(subtree(child))
            inner = [c for c in node.children if c in holders and c not in self.layer_of]
            if base is not None and base in inner:
                node = base
            else:
                node = inner[0] if len(inner) == 1 and not isinstance(inner[0].module, nn.ModuleList) else None
        return head

    def _flat(self, node: Node) -> bool:
        """Whether `node` is the root and itself the only block: what follows its feed-forward layer is a head."""
        return node.index == 0 and any(layer.root is node for layer in self.layers)

    def _base(self, node: Node) -> Node | None:
        prefix = getattr(node.cls, "base_model_prefix", None)
        if not isinstance(prefix, str) or not prefix:
            return None
        return next((c for c in node.children if c.name == prefix and c.count > 1), None)

    def _towers(self) -> None:
        """The stacks of layers, each with its name, and which part of the model belongs to it."""
        keys: dict[Layer, tuple[str, str]] = {}  # (scope path, label)
        both = {p for layer in self.layers for p in layer.root.path.split(".")} >= F.SIDES
        for layer in self.layers:
            keys[layer] = _scope(layer.root.path, both)
        distinct = dict.fromkeys(keys.values())
        self.single = len(distinct) <= 1
        self.scopes: dict[str, str] = {}
        if self.single:
            name = "decoder" if self._causal_model() else "encoder"
            self.scopes[name] = ""
            for layer in self.layers:
                layer.tower = name
        else:
            labels = [label for _, label in distinct]
            for (scope, label), first in {k: next(la for la in self.layers if keys[la] == k) for k in distinct}.items():
                name = label if label and labels.count(label) == 1 else scope.rsplit(".", 1)[-1]
                if not name:
                    name = "decoder" if self._causal_near(first.root) else "encoder"
                while name in self.scopes:
                    name += "_"
                self.scopes[name] = scope
                for layer in self.layers:
                    if keys[layer] == (scope, label):
                        layer.tower = name
        counts: dict[str, int] = {}
        for layer in self.layers:
            layer.number = counts.get(layer.tower, 0)
            counts[layer.tower] = layer.number + 1
        self.causal_towers = {t: self._causal_near(*(la.root for la in self.layers if la.tower == t)) or self.model_type in F.CAUSAL for t in self.scopes}

    def tower_of(self, node: Node) -> str:
        layer = self.layer_of.get(node)
        if layer is not None:
            return layer.tower
        best = ""
        for name, scope in self.scopes.items():
            inside = not scope or node.path == scope or node.path.startswith(scope + ".")
            if inside and (self.single or scope) and len(scope) >= len(self.scopes.get(best, "")):
                best = name
        return best

    # -- causality ----------------------------------------------------------------------------------------------------
    def _causal_model(self) -> bool:
        return self._causal_near(self.nodes[0]) or self.model_type in F.CAUSAL

    def _causal_near(self, *nodes: Node) -> bool:
        a = next((a for a in self.attn if not a.cross and any(n.holds(a.owner) for n in nodes)), None)
        return self.causal(a) if a is not None else any(n.holds(m.owner) for m in self.mixers for n in nodes)

    def causal(self, a: Attention) -> bool:
        """Whether a position sees only those before it."""
        if a.cross:
            return False
        if is_mha(a.owner):  # the caller decides; a layer that attends to a memory too is a decoder's
            return any(c.cross and c.owner.parent is a.owner.parent for c in self.attn)
        flag = a.owner.module.__dict__.get("is_causal")
        if flag is True or a.owner.get("is_decoder") is True or self.model_type in F.CAUSAL or "is_causal=True" in code_names(a.owner.cls):
            return True
        if flag is None and getattr(self.config_of(a.owner), "is_decoder", None) is True:
            return True
        for node in a.owner.up():
            if node is a.owner or node in self.layer_of:
                continue
            names = code_names(node.cls)
            bidirectional = "create_bidirectional_mask" in names
            if "create_causal_mask" in names and not bidirectional:
                return getattr(self.config_of(a.owner), "is_decoder", None) is not False or flag is None or "is_decoder" not in names
            if bidirectional:
                return False
        return False

    def _embeddings(self) -> None:
        """The token embedding of every tower gets the role 'embed'."""
        self.tokens: dict[str, Node] = {}
        loose = [n for n in self.nodes if any(m.kind == "embedding" for m in n.maps) and n not in self.layer_of and n not in self.head]
        flat = [n for n in self.nodes if any(m.kind == "embedding" for m in n.maps) and n in self.layer_of and self._flat(self.layer_of[n].root)]
        usual = [n for n in loose + flat if n.name.lower() in F.TOKEN_EMBEDDING or (n.name.isdigit() and n.label.lower() in F.TOKEN_EMBEDDING)]
        other = [n for n in loose + flat if n not in usual and not any(w in n.label.lower() for w in F.NOT_TOKENS)]
        for n in usual or other[:1]:
            n.maps[0].role = "embed"
            self.tokens.setdefault(self.tower_of(n), n)
        shared = self.tokens.get("")
        if shared is None and self.single and self.tokens:
            shared = next(iter(self.tokens.values()))
        self.shared = shared


def in_router(n: Node) -> bool:
    """Whether `n` is, or is in, what chooses among experts: it is called so, and stands beside them."""
    for node in (n, n.parent):
        if node is None or node.parent is None or node.name.lower() not in F.ROUTER:
            continue
        if any("expert" in c.name.lower() and c is not node for c in node.parent.children):
            return True
    return False


def label_of(component: str) -> str:
    parts = component.lower().split("_")
    for label, table in F.MODALITY.items():
        if any(p in table for p in parts):
            return label
    return ""


def _scope(path: str, sides: bool) -> tuple[str, str]:
    """(path of the tower, label) that the names on a layer's path give; ('', '') where they give none."""
    names = path.split(".")
    for i, name in enumerate(names):
        if label := label_of(name):
            return ".".join(names[: i + 1]), label
    if sides:
        for i, name in enumerate(names):
            if name in F.SIDES:
                return ".".join(names[: i + 1]), name
    return "", ""
