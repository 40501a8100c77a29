"""What a model is made of: its maps, layers, towers, attentions and feed-forward blocks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import families as f


class Maps:
    """Small questions about one module."""

    @staticmethod
    def signature(module: nn.Module) -> list[str]:
        """Names of the forward's parameters, without self; of the module's own class, under any that we generated."""
        forward = inspect.unwrap(own_class(module).forward)
        try:
            return list(inspect.signature(forward).parameters)[1:]
        except (TypeError, ValueError):
            return []


def own_class(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if "_veneer_generated" not in c.__dict__)


def kind_of(module: nn.Module) -> tuple[str, int, int] | None:
    """(kind, out, in) of a map, by what it has: sizes, and a forward of one tensor."""
    get = lambda k: getattr(module, k, None)  # noqa: E731
    if isinstance(get("num_embeddings"), int) and isinstance(get("embedding_dim"), int):
        return "embedding", get("embedding_dim"), get("num_embeddings")
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:
            return None
        inp = module.in_channels // module.groups
        for k in module.kernel_size:
            inp *= k
        return "conv", module.out_channels, inp
    if isinstance(get("in_features"), int) and isinstance(get("out_features"), int):
        return "linear", get("out_features"), get("in_features")
    if isinstance(get("nf"), int) and isinstance(get("nx"), int):
        return "transposed", get("nf"), get("nx")
    return None


@dataclass
class Attention:
    path: str
    block: str = "attn"
    q: str = ""  # the module whose input is the block's
    qkv: str = ""  # the fused projection, if there is one
    o: str = ""
    inner: int = 0  # size of all queries
    kv: int = 0  # size of all keys
    head_dim: int = 0
    kv_heads: int = 0
    via: str = ""


class Structure:
    """All of it, read once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.model_type = str(getattr(self.config, "model_type", ""))
        self.modules = {p: m for p, m in model.named_modules() if "_veneer" not in p.split(".")}
        self.maps = {p: k for p, m in self.modules.items() if (k := kind_of(m)) is not None}
        self.roles: dict[str, str] = {}
        self.mha: dict[str, str] = {}
        self.experts: dict[str, bool] = {}
        self.read_by: dict[str, str] = {}
        self.attentions: list[Attention] = []
        self.blocks: list[tuple[str, str, str, int]] = []
        self._container: dict[str, str] = {}
        self._layers()
        self._attention()
        self._towers()
        self._feed_forward()
        self._rest()

    # -- layers -------------------------------------------------------------------------------------------------------
    def _layers(self) -> None:
        """Numbered children of one class in a list are layers; the innermost that are no single map."""
        units: set[str] = set()
        for path, module in self.modules.items():
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or path.rpartition(".")[2] == "experts":
                continue
            children = {n: c for n, c in module._modules.items() if c is not None}
            kinds = {own_class(c) for c in children.values()}
            if len(kinds) == 1 and all(kind_of(c) is None and any(True for _ in c.parameters()) for c in children.values()):
                units |= {f"{path}.{n}" if path else n for n in children}
        for path in self.modules:
            names = path.split(".")
            for i in range(len(names), 0, -1):
                if (head := ".".join(names[:i])) in units:
                    self._container[path] = head
                    break
        self.units = [p for p in self.modules if p in units]

    def stack_of(self, unit: str) -> str:
        return ".".join("*" if n.isdigit() else n for n in unit.split(".")[:-1])

    def layer(self, path: str) -> int | None:
        return self._number.get(self._container.get(path, ""))

    def tower(self, path: str) -> str:
        unit = self._container.get(path)
        if unit is not None:
            return self.stacks.get(self.stack_of(unit), "")
        if len(self.stacks) == 1:
            return next(iter(self.stacks.values()))
        own = set(path.replace("_", ".").split("."))
        for word, tower in f.TOWERS.items():
            if word in own and tower in self.stacks.values():
                return tower
        for stack, tower in self.stacks.items():
            if path and stack.startswith(path.split(".embed")[0] + "."):
                return tower
        for tower in self.stacks.values():
            if tower in own:
                return tower
        return ""

    def causal(self, path: str) -> bool:
        return self._causal.get(self.tower(path), False)

    def batch_dim(self, path: str) -> int:
        for p, m in self.modules.items():
            if (path == p or path.startswith(p + ".") or not p) and getattr(m, "batch_first", None) is False and p:
                return 1
            if p and p.startswith(path + ".") and path and isinstance(m, nn.MultiheadAttention) and m.batch_first is False:
                return 1
        return 0

    def width(self, stack: str) -> int:
        for a in self.attentions:
            unit = self._container.get(a.path)
            if unit and self.stack_of(unit) == stack and a.q in self.maps:
                return self.maps[a.q][2]
            if unit and self.stack_of(unit) == stack and a.path in self.mha:
                return self.modules[a.path].embed_dim  # type: ignore[return-value]
        for role, enter, path, width in self.blocks:
            unit = self._container.get(path)
            if unit and self.stack_of(unit) == stack:
                return width
        return 0

    def layer_class(self, stack: str) -> str:
        return next((own_class(self.modules[u]).__name__ for u in self.units if self.stack_of(u) == stack), "")

    # -- attention ----------------------------------------------------------------------------------------------------
    def _attention(self) -> None:
        for path, module in self.modules.items():
            if hasattr(module, "in_proj_weight") and hasattr(module, "num_heads"):
                block = self._block(path)
                self.mha[path] = block
                hd = module.embed_dim // module.num_heads  # type: ignore[operator]
                a = Attention(path, block, path, "", path, module.embed_dim, module.embed_dim, hd, module.num_heads, "mha")  # type: ignore[arg-type]
                self.attentions.append(a)
                out = f"{path}.out_proj"
                self.roles[out], self.read_by[out] = f"{block}.o", path
                continue
            own = {n: f"{path}.{n}" if path else n for n, c in module._modules.items() if c is not None}
            named = {n.lower(): p for n, p in own.items() if p in self.maps and self.maps[p][0] in ("linear", "transposed", "conv")}
            q = next((named[n] for n in named if n in f.Q), "")
            k = next((named[n] for n in named if n in f.K), "")
            v = next((named[n] for n in named if n in f.V), "")
            fused = next((named[n] for n in named if n in f.QKV), "")
            if q and k and v:
                a = Attention(path, self._block(path), q, inner=self.maps[q][1], kv=self.maps[k][1])
                o = self._output(path, named, {q, k, v}, self.maps[v][1])
                self._add(a, {q: "q", k: "k", v: "v"}, o)
            elif fused and not (q and not v):
                a = Attention(path, self._block(path), fused, qkv=fused)
                o = self._output(path, named, {fused}, 0)
                total = self.maps[fused][1]
                a.inner = self.maps[o][2] if o and self.maps[o][2] < total else total // 3
                a.kv = (total - a.inner) // 2
                self._add(a, {fused: "qkv"}, o)
            elif path in self.units or (module._modules and path not in self._container and not self.units):
                self._by_shape(path, own)

    def _by_shape(self, path: str, own: dict[str, str]) -> None:
        """Attention whose names tell nothing: four square maps in a row, or d -> 3d followed by d -> d."""
        inside = [p for p in self.maps if p.startswith(path + ".") or not path]
        if any(p in self.roles for p in inside) or any(self._named_inside(path)):
            return
        parents: dict[str, list[str]] = {}
        for p in inside:
            if self.maps[p][0] == "linear":
                parents.setdefault(p.rpartition(".")[0], []).append(p)
        for parent, ps in parents.items():
            shapes = [self.maps[p][1:] for p in ps]
            for i in range(len(ps)):
                d = shapes[i][1]
                four = shapes[i : i + 4]
                if len(four) == 4 and all(s == (d, d) for s in four):
                    a = Attention(parent, self._block(parent), ps[i], inner=d, kv=d)
                    self._add(a, dict(zip(ps[i : i + 3], "qkv", strict=True)), ps[i + 3])
                    return
                if shapes[i] == (3 * d, d) and i + 1 < len(ps) and shapes[i + 1] == (d, d):
                    a = Attention(parent, self._block(parent), ps[i], qkv=ps[i], inner=d, kv=d)
                    self._add(a, {ps[i]: "qkv"}, ps[i + 1])
                    return

    def _named_inside(self, path: str) -> list[str]:
        names = f.Q | f.QKV
        return [p for p, m in self.modules.items() if (p.startswith(path + ".") or not path) and (p.rpartition(".")[2].lower() in names or hasattr(m, "in_proj_weight"))]

    def _block(self, path: str) -> str:
        low = path.lower()
        if any(c in low for c in f.CROSS):
            return "cross"
        return "attn"

    def _output(self, path: str, named: dict[str, str], taken: set[str], inp: int) -> str:
        """The map from the heads back to the width: in the module, else next to it."""
        for n, p in named.items():
            if n in f.O and p not in taken:
                return p
        inside = [p for p in self.maps if p.startswith(path + ".") and p not in taken and self.maps[p][0] != "embedding"]
        inside = [p for p in inside if any(x in f.O for x in p[len(path) + 1 :].lower().split("."))]
        if inside:
            return inside[0]
        parent = path.rpartition(".")[0]
        after = False
        for p in self.modules:
            if p == path:
                after = True
            elif after and p.startswith(parent + ".") and not p.startswith(path + ".") and p in self.maps:
                return p if not inp or self.maps[p][2] == inp else ""
        return ""

    def _add(self, a: Attention, roles: dict[str, str], o: str) -> None:
        for p, r in roles.items():
            self.roles[p] = f"{a.block}.{r}"
        if o:
            self.roles[o] = f"{a.block}.o"
            a.o = o
        module = self.modules[a.path]
        get = lambda *keys: next((v for k in keys if isinstance(v := getattr(module, k, None), int) and not isinstance(v, bool) and v > 0), 0)  # noqa: E731
        hd = get("head_dim", "attention_head_size", "key_value_proj_dim", "d_head", "head_size", "attn_head_size", "dim_head", "d_kv")
        heads = get("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads", "h", "number_of_heads")
        if not heads:
            c = self.config
            heads = next((v for k in ("num_attention_heads", "n_head", "num_heads", "n_heads") if isinstance(v := getattr(c, k, None), int)), 0)
        if not hd and heads:
            hd = a.inner // heads
        a.head_dim = hd
        a.kv_heads = a.kv // hd if hd else 0
        names = _code_names(module)
        if "ALL_ATTENTION_FUNCTIONS" in names:
            a.via = "registry"
        elif "scaled_dot_product_attention" in names:
            a.via = "sdpa"
        self.attentions.append(a)

    # -- towers -------------------------------------------------------------------------------------------------------
    def _towers(self) -> None:
        attended = {self.stack_of(u) for a in self.attentions if (u := self._container.get(a.path))}
        main = attended or self._largest()
        self.stacks: dict[str, str] = {}
        self._causal: dict[str, bool] = {}
        words = {s: s.lower().replace("_", ".").split(".") for s in main}
        order = [s for s in dict.fromkeys(self.stack_of(u) for u in self.units) if s in main]
        if order and all("decoder" in words[s] or "encoder" in words[s] for s in order):
            order.sort(key=lambda s: "decoder" in words[s])
        for stack in order:
            causal = self._is_causal(stack)
            tower = next((t for w, t in f.TOWERS.items() if w in words[stack]), "") if len(order) > 1 else ""
            if not tower and len(order) > 1:
                tower = next((w for w in ("encoder", "decoder") if w in words[stack]), "")
            tower = tower or ("decoder" if causal else "encoder")
            while tower in self.stacks.values() and tower not in ("",):
                tower += "2"
            self.stacks[stack], self._causal[tower] = tower, causal
        counts: dict[str, int] = {}
        self._number: dict[str, int] = {}
        for u in self.units:
            tower = self.stacks.get(self.stack_of(u))
            if tower is not None:
                self._number[u] = counts.get(tower, 0)
                counts[tower] = self._number[u] + 1

    def _largest(self) -> set[str]:
        size: dict[str, int] = {}
        for u in self.units:
            size[self.stack_of(u)] = size.get(self.stack_of(u), 0) + sum(p.numel() for p in self.modules[u].parameters())
        best = max(size.values(), default=0)
        return {s for s, n in size.items() if n == best}

    def _is_causal(self, stack: str) -> bool:
        if self.model_type in f.CAUSAL:
            return True
        for a in self.attentions:
            unit = self._container.get(a.path)
            if unit and self.stack_of(unit) == stack and a.block == "attn":
                module = self.modules[a.path]
                flag = getattr(module, "is_causal", None)
                if flag is None:
                    flag = getattr(module, "is_decoder", None)
                if flag is not None:
                    return bool(flag)
        return bool(getattr(self.config, "is_decoder", False))

    # -- feed-forward -------------------------------------------------------------------------------------------------
    def _feed_forward(self) -> None:
        for path, module in self.modules.items():
            three = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3 and n in f.FUSED_EXPERTS}
            if "down_proj" in three or "w2" in three:
                self._expert(path, module, three)
        groups: dict[str, list[str]] = {}
        mixers = self._mixers()
        for p, (kind, _, _) in self.maps.items():
            unit = self._container.get(p, "" if not self.units else None)
            if unit is None or p in self.roles or kind not in ("linear", "transposed") or any(p.startswith(m + ".") for m in mixers):
                continue
            groups.setdefault(unit, []).append(p)
        for maps in groups.values():
            self._pairs(maps)

    def _pairs(self, maps: list[str]) -> None:
        """down: I -> d, after one or two d -> I, or one d -> 2I; nearest by parent first."""
        for w in maps:
            _, wout, win = self.maps[w]
            before = [u for u in maps[: maps.index(w)] if u not in self.roles and self.maps[u][2] == wout and self.maps[u][1] in (win, 2 * win)]
            near = [u for u in before if u.rpartition(".")[0] == w.rpartition(".")[0]]
            after = [u for u in maps[maps.index(w) + 1 :] if u not in self.roles and u.rpartition(".")[0] == w.rpartition(".")[0] and self.maps[u][1:] == (win, wout) and win != wout]
            ups = (near or before[-2:]) + after
            if not ups or w in self.roles:
                continue
            exact = [u for u in ups if self.maps[u][1] == win]
            if exact:
                exact = exact[-2:] if len(exact) > 2 else exact
                gate = next((u for u in exact if u.rpartition(".")[2].lower() in f.GATE), "") if len(exact) == 2 else ""
                if len(exact) == 2 and not gate:
                    gate = exact[0]
                for u in exact:
                    self.roles[u] = "ffn.gate" if u == gate else "ffn.up"
                enter = exact[0]
            else:
                enter = ups[-1]
                self.roles[enter] = "ffn.gate_up"
            self.roles[w] = "ffn.down"
            if not any(p and w.startswith(p.rpartition(".")[0] + ".") and self._container.get(p) == self._container.get(w) for p in self.experts):
                self.blocks.append(("ffn", enter, w, wout))

    def _expert(self, path: str, module: nn.Module, three: dict[str, Any]) -> None:
        unit = self._container.get(path, "")
        width = next((self.maps[a.q][2] for a in self.attentions if self._container.get(a.path) == unit and a.q in self.maps), 0)
        down = three.get("down_proj", three.get("w2"))
        self.experts[path] = bool(getattr(module, "is_transposed", down.shape[1] != width and down.shape[2] == width))
        block = path.rpartition(".")[0]
        self.blocks.append(("ffn", block, block, width))
        for p in self.maps:  # the router beside the experts
            if p.rpartition(".")[0] == block and self.maps[p][1] == down.shape[0]:
                self.roles[p] = "ffn.router"

    def _mixers(self) -> list[str]:
        """State-space mixers: a projection in, a short convolution, a projection out."""
        out = []
        for path, module in self.modules.items():
            own = set(module._modules)
            if {"in_proj", "out_proj"} <= own and ("x_proj" in own or "conv1d" in own):
                out.append(path)
                for n, r in (("in_proj", "in"), ("out_proj", "out"), ("x_proj", "x"), ("dt_proj", "dt")):
                    if n in own:
                        self.roles[f"{path}.{n}"] = f"mixer.{r}"
                self.blocks.append(("mixer", f"{path}.in_proj", f"{path}.out_proj", self.maps[f"{path}.out_proj"][1]))
        return out

    # -- norms, embeddings, head --------------------------------------------------------------------------------------
    def _rest(self) -> None:
        model = self.model
        prefix = getattr(model, "base_model_prefix", "")
        has_base = bool(prefix) and prefix in model._modules
        last = -1
        order = list(self.modules)
        for i, p in enumerate(order):
            if self._container.get(p) in self._number:
                last = i
        for getter, role in (("get_output_embeddings", "head"), ("get_input_embeddings", "embed")):
            try:
                module = getattr(model, getter)() if hasattr(model, getter) else None
            except (NotImplementedError, AttributeError):
                module = None
            path = next((p for p, m in self.modules.items() if m is module), "") if module is not None else ""
            if path:
                self.roles[path] = role
        for i, p in enumerate(order):
            module = self.modules[p]
            if p in self.roles or not p or not module._parameters:
                continue
            inside = p == prefix or p.startswith(prefix + ".")
            after = i > last >= 0 and "pool" not in p.lower() and "projection" not in p.lower()
            norm = "norm" in own_class(module).__name__.lower()
            if has_base and not inside and p not in self._container:
                self.roles[p] = "head"
            elif norm:
                self.roles[p] = "norm"
            elif not has_base and after and p in self.maps and self.maps[p][0] != "embedding" and not any(p.startswith(s.partition(".")[0] + ".") for s in self.stacks):
                self.roles[p] = "head"
            elif p in self.maps and self.maps[p][0] == "embedding" and "embed" not in self.roles.values() and not hasattr(model, "get_input_embeddings"):
                self.roles[p] = "embed"


def _code_names(module: nn.Module) -> set[str]:
    """Names that the class's forward uses, and those of its methods that it calls on itself."""
    cls = own_class(module)
    seen: set[str] = set()
    todo = ["forward"]
    names: set[str] = set()
    while todo:
        name = todo.pop()
        function = inspect.unwrap(getattr(cls, name, None)) if callable(getattr(cls, name, None)) else None
        code = getattr(function, "__code__", None)
        if code is None or name in seen:
            continue
        seen.add(name)
        names |= set(code.co_names)
        if name == "forward":
            todo += [n for n in code.co_names if n.startswith("_") and n in cls.__dict__]
    return names


def read(model: nn.Module) -> Structure:
    return Structure(model)
