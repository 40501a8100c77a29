"""From a model to its sites, by structure: repeated layers, names of projections, shapes, the attention call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from . import families as f
from .sites import Site, Slice
from .structure import Maps, Structure, read


def sites(model: nn.Module) -> list[Site]:
    """Every site of `model`, in the model's order, port by port within a module; also of a model with adapters.

    Found from structure, so it works for models that no hint covers. A site whose role structure does not tell has
    role ''; 'linear', 'all' and 'name:REGEX' still reach it.
    """
    s = read(model)
    found = [*_weights(s), *_params(s), *_hidden(s), *_kv(s), *_embed(s)]
    order = {p: i for i, p in enumerate(s.modules)}
    return sorted(found, key=lambda x: order[x.path])


def why_not(model: nn.Module, port: str) -> str:
    """Why `model` has no site of `port`."""
    if port == "kv":
        if not read(model).attentions:
            return "It has no attention that takes keys and values; use vn.LoRA, vn.Bottleneck or vn.PromptTuning"
        return "Its attention computes its scores by itself (not through transformers' AttentionInterface nor F.scaled_dot_product_attention); use vn.LoRA or vn.Bottleneck"
    if port == "embed":
        return "No module takes its embedded input as an argument; use vn.Prefix or vn.LoRA"
    if port == "hidden":
        return "No attention or feed-forward block was recognised; vn.LoRA(at='name:REGEX') takes any linear map"
    return ""


def _slices(s: Structure, path: str, role: str, total: int) -> list[tuple[str, Slice | None]]:
    """The roles that the map at `path` holds, each with its slice."""
    if role == "attn.qkv" or role == "cross.qkv":
        block = role.split(".")[0]
        a = next(a for a in s.attentions if a.qkv == path)
        return [(f"{block}.{x}", part) for x, part in zip("qkv", _fused(s, a, total), strict=True)]
    if role == "ffn.gate_up":
        half = total // 2
        return [("ffn.gate", Slice(1, total, 0, half)), ("ffn.up", Slice(1, total, half, total))]
    return [(role, None)]


def _fused(s: Structure, a: Any, total: int) -> tuple[Slice, Slice, Slice]:
    layout = f.FUSED.get(s.model_type, "")
    hd = a.head_dim
    if layout == "falcon":
        c = s.model.config
        if getattr(c, "new_decoder_architecture", False):
            per = c.num_attention_heads // c.num_kv_heads
            n = (per + 2) * hd
            g = total // n
            return Slice(g, n, 0, per * hd), Slice(g, n, per * hd, (per + 1) * hd), Slice(g, n, (per + 1) * hd, n)
        layout = "" if getattr(c, "multi_query", False) else "per_head"
    if layout == "per_head":
        n = 3 * hd
        g = total // n
        return Slice(g, n, 0, hd), Slice(g, n, hd, 2 * hd), Slice(g, n, 2 * hd, n)
    if layout == "codegen":
        n = total // 4
        t = n // 3
        return Slice(4, n, 0, t), Slice(4, n, 2 * t, n), Slice(4, n, t, 2 * t)
    q = a.inner or total // 3
    k = (total - q) // 2
    return Slice(1, total, 0, q), Slice(1, total, q, q + k), Slice(1, total, q + k, total)


def _weights(s: Structure) -> Iterator[Site]:
    for path, module in s.modules.items():
        where = {"layer": s.layer(path), "tower": s.tower(path), "causal": s.causal(path), "batch_dim": s.batch_dim(path)}
        if path in s.maps:
            kind, out, inp = s.maps[path]
            tensor, enter = "weight", ""
            if path in s.read_by:
                kind, enter = "tensor", s.read_by[path]
            for role, part in _slices(s, path, s.roles.get(path, ""), out):
                yield Site(path, "weight", role, kind=kind, tensor=tensor, out=part.size if part else out, inp=inp, slice=part, enter=enter, **where)
        if path in s.mha:
            w = module._parameters.get("in_proj_weight")
            block = s.mha[path]
            if w is not None:
                d = w.shape[1]
                for i, x in enumerate("qkv"):
                    yield Site(path, "weight", f"{block}.{x}", kind="tensor", tensor="in_proj_weight", out=d, inp=d, slice=Slice(1, 3 * d, i * d, (i + 1) * d), **where)
            else:
                for x in "qkv":
                    w = module._parameters[f"{x}_proj_weight"]
                    yield Site(path, "weight", f"{block}.{x}", kind="tensor", tensor=f"{x}_proj_weight", out=w.shape[0], inp=w.shape[1], **where)
        if path in s.experts:
            for tensor, roles in f.FUSED_EXPERTS.items():
                w = module._parameters.get(tensor)
                if w is None or w.dim() != 3:
                    continue
                e, a, b = w.shape
                transposed = s.experts[path]
                out, inp = (b, a) if transposed else (a, b)
                for i, role in enumerate(roles):
                    n = out // len(roles)
                    part = Slice(1, out, i * n, (i + 1) * n) if len(roles) > 1 else None
                    yield Site(path, "weight", role, kind="experts", tensor=tensor, out=n, inp=inp, slice=part, experts=e, transposed=transposed, **where)


def _params(s: Structure) -> Iterator[Site]:
    for path, module in s.modules.items():
        role = s.roles.get(path, "")
        if path in s.mha:
            role = f"{s.mha[path]}.qkv"
        elif path in s.experts:
            role = "ffn.experts"
        for name, p in module._parameters.items():
            if p is not None:
                yield Site(
                    path, "param", role, s.layer(path), s.tower(path), tensor=name, shape=tuple(p.shape), causal=s.causal(path),
                    batch_dim=s.batch_dim(path), enter=s.read_by.get(path, ""),
                )  # fmt: skip


def _hidden(s: Structure) -> Iterator[Site]:
    for a in s.attentions:
        if a.o and a.q:
            width = s.maps[a.o][1] if a.o in s.maps else getattr(s.modules[a.o], "embed_dim", 0)
            yield Site(a.o, "hidden", a.block, s.layer(a.path), s.tower(a.path), enter=a.q, width=width, causal=s.causal(a.path), batch_dim=s.batch_dim(a.path))
    for role, enter, path, width in s.blocks:
        yield Site(path, "hidden", role, s.layer(path), s.tower(path), enter=enter, width=width, causal=s.causal(path), batch_dim=s.batch_dim(path))


def _kv(s: Structure) -> Iterator[Site]:
    for a in s.attentions:
        if a.via and a.kv_heads and a.head_dim:
            yield Site(a.path, "kv", a.block, s.layer(a.path), s.tower(a.path), enter=a.q, heads=a.kv_heads, head_dim=a.head_dim, via=a.via, causal=s.causal(a.path) and a.block == "attn", batch_dim=s.batch_dim(a.path))


def _embed(s: Structure) -> Iterator[Site]:
    several = len(s.stacks) > 1
    class_token = any(
        any(t in n.lower() for t in ("cls_token", "class_token", "class_embedding")) for m in s.modules.values() for n in m._parameters
    )
    for stack, tower in s.stacks.items():
        if any(part == "*" for part in stack.split(".")):
            continue  # nested stages change the sequence between them
        path = stack
        while True:
            path = path.rpartition(".")[0]
            module = s.modules[path]
            names = Maps.signature(module)
            if "inputs_embeds" in names and "input_ids" in names:
                table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
                enter = next((p for p, m in s.modules.items() if m is table), "")
                if enter or table is None:
                    width = getattr(table, "embedding_dim", 0) or s.width(stack)
                    causal = s.causal(stack)
                    yield Site(path, "embed", "embed", None, tower, enter=enter, width=width, argument="inputs_embeds", keep=int(not causal and not several), causal=causal)
                break
            first = names[0] if names else ""
            own = s.layer_class(stack)
            if path and first in ("hidden_states", "inputs_embeds", "src", "hidden_state", "x") and type(module).__name__ != own:
                yield Site(
                    path, "embed", "embed", None, tower, width=s.width(stack), argument=first, keep=int(class_token and tower != "text"),
                    batch_dim=s.batch_dim(path), causal=s.causal(stack),
                )  # fmt: skip
                break
            if not path:
                break

