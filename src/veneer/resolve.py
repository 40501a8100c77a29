"""The sites of a model, from its structure: `sites(model)`, and `why_not` where there are none of a kind."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import nn

from . import families as F
from .anatomy import Anatomy, in_router, label_of
from .code import code_names, reads
from .roles import Attention, head_sizes
from .sites import PORTS, Site
from .structure import HIDDEN, Layer, Node, is_mha, subtree, words


def sites(model: nn.Module) -> list[Site]:
    """Every place of `model` where a method may act, in the model's order within each port.

    Computed anew at each call: what is attached already is passed over, and a change of the model is seen.
    """
    return Resolved(model).sites()


def why_not(model: nn.Module, port: str) -> str:
    """A sentence that says why `model` has no site for `port`; '' where it has some."""
    r = Resolved(model)
    found = r.sites()
    if any(s.port == port for s in found):
        return ""
    name = type(model).__name__
    if port not in PORTS:
        return f"there is no port {port!r}; the ports are {', '.join(PORTS)}"
    if port == "kv":
        if not r.attn:
            kind = "state-space mixers in place of attention" if r.mixers else "no attention"
            return f"{name} has {kind}, so there are no keys and values to put a prefix before"
        kind = r.attn[0].owner.cls.__name__
        if r._via(r.attn[0])[0] is not None:
            return f"{kind} in {name} does not say its number of heads, or its keys and values differ in width"
        return (
            f"{kind} in {name} computes attention in its own code, and calls neither transformers' AttentionInterface nor"
            " F.scaled_dot_product_attention, so keys and values cannot be added there"
        )
    if port == "embed":
        if not r.attn and not r.mixers:
            return f"{name} has no layers over a sequence, so there is nothing that a prompt could stand before"
        return f"no module of {name} takes its sequence already embedded (as inputs_embeds or an encoder's first argument)"
    if port == "hidden":
        return f"no block of {name} has the shape of attention, a feed-forward layer or a mixer with a known end"
    return f"{name} has no {'parameters' if port == 'param' else 'linear, convolution or embedding layers'}"


class Resolved(Anatomy):
    """A model's anatomy, and the sites of each port that follow from it."""

    def sites(self) -> list[Site]:
        return [*self._weights(), *self._params(), *self._hidden(), *self._kv(), *self._embed()]

    def _place(self, node: Node) -> dict[str, Any]:
        layer = self.layer_of.get(node)
        if layer is not None and node in self.head:
            layer = None
        tower = self.tower_of(node)
        return {
            "layer": layer.number if layer else None, "tower": tower, "causal": self.causal_towers.get(tower, False),
            "batch_dim": self.batch_dim(node),
        }  # fmt: skip

    def _read_by(self, node: Node) -> str:
        """The module that computes with the parameters of `node` in its place: a MultiheadAttention with those of its
        out_proj, Mamba's mixer with those of its convolution; '' where `node` does so itself."""
        parent = node.parent
        return parent.path if parent is not None and (is_mha(parent) or node.name in reads(parent.cls)) else ""

    def _judged_by(self, node: Node) -> str:
        """As `_read_by`, where the tensor's effect must be a state: a router gives scores and numbers of experts, so
        what it does is seen in the output of its block."""
        if in_router(node):
            inner = next(n for n in node.up() if n.parent is not None and n.name.lower() in F.ROUTER)
            return inner.parent.path if inner.parent is not None else ""
        return self._read_by(node)

    def _entering(self, node: Node, path: str) -> int:
        """Channels of what enters the module at `path`, which reads the parameters of `node`; 0 where it is `node`."""
        if not path:
            return 0
        layer = self.layer_of.get(self.at[path])
        return layer.width if layer is not None else 0

    def batch_dim(self, node: Node) -> int:
        """1 in torch's own transformer layers and attention where their batch comes second."""
        for n in node.up():
            torch_own = n.cls.__module__.startswith("torch.nn.modules.")
            if is_mha(n) or (torch_own and n.cls.__module__.endswith("transformer")):
                mha = n if is_mha(n) else next((c for c in subtree(n) if is_mha(c)), None)
                if mha is not None and not getattr(mha.module, "batch_first", True):
                    return 1
        return 0

    def _weights(self) -> list[Site]:
        found = []
        for n in self.nodes:
            for m in n.maps:
                role = "head" if n in self.head else m.role
                common = dict(
                    path=n.path, port="weight", kind=m.kind, tensor=m.tensor, inp=m.inp, experts=m.experts,
                    transposed=m.transposed, enter=(reader := self._read_by(n)), width=self._entering(n, reader), **self._place(n),
                )  # fmt: skip
                if m.parts and n not in self.head:
                    found += [Site(role=r, out=s.size, slice=s, **common) for r, s in m.parts]
                else:
                    found.append(Site(role=role, out=m.out, **common))
        return found

    def _params(self) -> list[Site]:
        found = []
        owners: dict[int, list[Node]] = {}
        for n in self.nodes:
            for p in n.module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), []).append(n)
        mixed = {n for mixer in self.mixers for n in subtree(mixer.owner)}
        for n in self.nodes:
            role = self._param_role(n, mixed)
            for name, p in n.module._parameters.items():
                if p is None or name.startswith(HIDDEN):
                    continue
                several = owners[id(p)]
                # a tied tensor stands where maps use it; a second name for it that no map uses is left out
                if len(several) > 1 and not n.maps and any(o.maps for o in several):
                    continue
                place = {"enter": (reader := self._judged_by(n)), "width": self._entering(n, reader), **self._place(n)}
                found.append(Site(path=n.path, port="param", role=role, tensor=name, shape=tuple(p.shape), **place))
        return found

    def _param_role(self, n: Node, mixed: set[Node]) -> str:
        if n in self.head:
            return "head"
        if any(m.kind == "experts" and m.role for m in n.maps):
            return "ffn.experts"
        if n.maps and n.maps[0].role:
            return n.maps[0].role
        if _is_norm(n):
            return "norm"
        if n in mixed:
            return "mixer"
        if n in self.layer_of and in_router(n):
            return "router"
        return ""

    def _hidden(self) -> list[Site]:
        found: list[tuple[int, Site]] = []

        def add(role: str, enter: Node, path: Node, width: int, where: Node) -> None:
            site = Site(path=path.path, port="hidden", role=role, enter=enter.path, width=width, **self._place(where))
            found.append((path.index, site))

        for a in self.attn:
            if is_mha(a.owner):
                add("cross" if a.cross else "attn", a.owner, a.owner, a.owner.module.embed_dim, a.owner)  # type: ignore[arg-type]
            elif a.o is not None:
                enter = _enter(a)
                add("cross" if a.cross else "attn", enter, a.o.node, a.o.out, a.owner)
        for mixer in self.mixers:
            add("mixer", mixer.enter.node, mixer.out.node, mixer.out.out, mixer.owner)
        blocks: dict[Node, None] = {}
        for feed, layer in self.feeds:
            if feed.block is not None:
                if feed.block is not layer.root and feed.block not in blocks:
                    blocks[feed.block] = None
                    add("ffn", feed.block, feed.block, feed.down.out, feed.block)
                continue
            enter = feed.gate if feed.gate is not None else feed.up
            add("ffn", enter.node, feed.down.node, feed.down.out, feed.down.node)
        for layer in self.layers:
            whole = layer.root.index and not layer.also and not isinstance(layer.root.module, (nn.ModuleList, nn.ModuleDict))
            if whole and layer.width:
                add("layer", layer.root, layer.root, layer.width, layer.root)
        return [s for _, s in sorted(found, key=lambda e: e[0])]

    def _kv(self) -> list[Site]:
        found = []
        for a in self.attn:
            caller, via = self._via(a)
            if caller is None:
                continue
            _, heads, dim = head_sizes(a, self.config_of(a.owner))
            wide = a.owner.get("v_head_dim")
            if not heads or not dim or (wide and wide != dim) or a.owner.get("qk_nope_head_dim"):
                continue
            enter = caller if via == "mha" else _enter(a)
            found.append(
                Site(
                    path=caller.path, port="kv", role="cross" if a.cross else "attn", enter=enter.path, heads=heads, head_dim=dim,
                    via=via, width=a.q.inp, **{**self._place(a.owner), "causal": self.causal(a)},
                )
            )  # fmt: skip
        return found

    def _via(self, a: Attention) -> tuple[Node | None, str]:
        """The module that makes the attention call, and how."""
        if is_mha(a.owner):
            return a.owner, "mha"
        layer = self.layer_of.get(a.owner)
        for n in a.owner.up():
            names = code_names(n.cls)
            if "ALL_ATTENTION_FUNCTIONS" in names:
                return n, "registry"
            if "scaled_dot_product_attention" in names:
                # a forward that can do without it does so unless the configuration asks for it
                impl = getattr(self.config_of(n), "_attn_implementation", None)
                if "softmax" in names and impl is not None and impl != "sdpa":
                    return None, ""
                return n, "sdpa"
            if layer is None or n is layer.root:
                break
        return None, ""

    def _embed(self) -> list[Site]:
        found = []
        for name, scope in self.scopes.items():
            layers = [la for la in self.layers if la.tower == name]
            if not layers:
                continue
            cores = any(la.root.holds(c.owner) for c in (*self.attn, *self.mixers) for la in layers)
            tokens = self.tokens.get(name) or (self.shared if not self._modal(scope) else None)
            above = [n for n in layers[0].root.up() if n not in self.layer_of] if layers else []
            causal = self.causal_towers[name]
            keep = 0
            node = next((n for n in above if {"inputs_embeds", "input_ids"} <= set(_arguments(n.cls))), None)
            argument = "inputs_embeds"
            if node is not None and tokens is not None:
                cls_first = self.single and not causal and not getattr(self.config, "is_encoder_decoder", False)
                keep = 1 if cls_first else 0
                width = tokens.maps[0].out
            else:
                node, argument = self._embedded_first(above, layers) if cores else (None, "")
                if node is None:
                    continue
                owners = [n for n in self.nodes if self.tower_of(n) == name]
                keep = int(any(t in F.CLASS_TOKEN for n in owners for t in n.module._parameters))
                width = layers[0].width
            found.append(
                Site(
                    path=node.path, port="embed", role="embed", tower=name, argument=argument, keep=keep, causal=causal,
                    enter=tokens.path if tokens is not None else "", width=width, batch_dim=self.batch_dim(node),
                )
            )  # fmt: skip
        return found

    def _modal(self, scope: str) -> bool:
        return bool(scope) and label_of(scope.rsplit(".", 1)[-1]) in ("vision", "audio")

    def _embedded_first(self, above: list[Node], layers: list[Layer]) -> tuple[Node | None, str]:
        """The innermost module round the layers whose first argument is an embedded sequence."""
        if any(la.nested for la in layers) or not above:
            return None, ""
        for n in above:
            if isinstance(n.module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
                continue
            first = next(iter(_arguments(n.cls)), "")
            embeds = [m for c in subtree(n) if c not in self.layer_of for m in c.maps if m.kind == "embedding"]
            if first in F.EMBEDDED and not embeds and n.path:
                return n, first
            return None, ""
        return None, ""


def _enter(a: Attention) -> Node:
    """The map that the block's input enters: v, which sees it once and without positions (DeBERTa gives q and k its
    relative positions too); q where v sees something else."""
    if words(a.q.name) == "q_b":  # low-rank queries: the map before them
        return next((m.node for m in a.owner.own() if words(m.name) == "q_a"), a.q.node)
    return a.v.node if not a.cross and a.v.inp == a.q.inp and a.v is not a.k else a.q.node


def _is_norm(n: Node) -> bool:
    params = [p for p in n.module._parameters.values() if p is not None]
    if not params or any(p.dim() != 1 for p in params) or n.children:
        return False
    names = n.module.__dict__
    named = "norm" in n.cls.__name__.lower() or "norm" in n.name.lower() or n.name.lower() in ("ln", "ln_f", "ln1", "ln2", "ln_1", "ln_2")
    return named or (len(params) <= 2 and any(k in names for k in ("normalized_shape", "variance_epsilon", "eps")))


@lru_cache(maxsize=1024)
def _arguments(cls: type) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()
