"""What forms.py needs beyond names: fields that follow from tensors, and tensors that PEFT lays out in another way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import resolve
from ..errors import CapabilityError
from ..methods.orthogonal import skew
from .config import Source
from .table import NATIVE, Made, Place, Tensors


def rank_alpha(p: Place) -> dict[str, Any]:
    return {"r": p.whole("r", 8), "alpha": p.number("alpha", 8)}


def alpha_of(m: Any, default: float) -> float:
    return default if m.alpha is None else m.alpha


# -- AdaLoRA: the scale is lora_alpha / (init_r + 1e-5), and each module keeps its own number of triplets ---------------
def adalora(p: Place) -> dict[str, Any]:
    r, first = p.tensors["A"].shape[0], p.whole("init_r", 12)
    alpha = p.number("lora_alpha", 8)
    return {
        "r": max(1, r), "target": max(1, min(r, p.whole("target_r", 8))), "alpha": (alpha if alpha > 0 else first) * r / (first + 1e-5),
        "dropout": p.number("lora_dropout", 0.0), "every": p.whole("deltaT", 1), "beta1": p.number("beta1", 0.85), "beta2": p.number("beta2", 0.85),
        "orthogonal": p.number("orth_reg_weight", 0.5),
    }  # fmt: skip


def triplets(p: Place) -> Tensors:
    e = p.tensors["E"].flatten()
    return {**p.tensors, "E": e, "kept": torch.ones(len(e), dtype=torch.bool)} if len(e) else {}  # all triplets are gone: nothing is added


def adalora_out(m: Made) -> Tensors:
    """The triplets that are kept, with the scale in E."""
    kept = m.tensors["kept"]
    return {"A": m.tensors["A"][kept], "B": m.tensors["B"][:, kept], "E": (m.tensors["E"] * m.part.scale)[kept].unsqueeze(1)}


def adalora_fields(m: Made) -> dict[str, Any]:
    a, steps = m.method, 1000  # PEFT counts steps, and we shares of a run: those of one with this many
    return {
        "lora_dropout": a.dropout, "deltaT": a.every, "beta1": a.beta1, "beta2": a.beta2, "orth_reg_weight": a.orthogonal, "total_step": steps,
        "tinit": int(a.warmup * steps), "tfinal": int(a.final * steps),
    }  # fmt: skip


def adalora_ranks(made: list[Made]) -> dict[str, Any]:
    """The rank before anything was pruned, the alpha with which PEFT's scale is 1, and which triplets each module keeps."""
    first, kept = max(m.part.E.shape[0] for m in made), {m.site.path: m.tensors["kept"].tolist() for m in made}
    pruned = {f"{path}.lora_E": k + [False] * (first - len(k)) for path, k in kept.items()}
    target = max(1, round(sum(map(sum, kept.values())) / len(kept))) if any(sum(k) < first for k in kept.values()) else min(m.method.target for m in made)
    return {
        "init_r": first, "r": first, "target_r": target, "lora_alpha": first + 1e-5,
        "rank_pattern": pruned if any(sum(k) < first for k in pruned.values()) else None,
    }  # fmt: skip


# -- rotations ----------------------------------------------------------------------------------------------------------
def series(source: Source) -> int:
    """Terms of the inverse's series. PEFT's three are four: it never leaves the cube out."""
    terms = source.whole("num_cayley_neumann_terms", 5)
    if terms < 3:
        raise source.fail(f"num_cayley_neumann_terms={terms} leaves no rotation", "Merge it with PEFT")
    return max(4, terms)


def series_out(terms: int | None) -> int:
    if terms == 3:
        raise CapabilityError("PEFT's series of a rotation has four terms and more, and this one three", fix=NATIVE)
    return terms or 5


def oft(p: Place) -> dict[str, Any]:
    block = (1 + math.isqrt(1 + 8 * p.tensors["Q"].shape[1])) // 2
    terms = series(p.source) if p.source.flag("use_cayley_neumann") else None
    return {"block": block, "shared": p.source.flag("block_share"), "series": terms, "constrain": p.number("eps", 6e-5) if p.source.flag("coft") else None}


def oft_in(p: Place) -> Tensors:
    # PEFT's exact form is the inverse of its series': (1 - Q)(1 + Q)⁻¹
    return {"Q": p.tensors["Q"] if p.source.flag("use_cayley_neumann") else -p.tensors["Q"]}


def oft_fields(m: Made) -> dict[str, Any]:
    o = m.method
    return {
        "r": 0, "oft_block_size": o.block, "block_share": o.shared, "use_cayley_neumann": o.series is not None,
        "num_cayley_neumann_terms": series_out(o.series), "coft": o.constrain is not None, "eps": 6e-5 if o.constrain is None else o.constrain,
    }  # fmt: skip


def boft_in(p: Place) -> Tensors:
    a = p.tensors["Q"]
    rows, cols = torch.triu_indices(a.shape[-1], a.shape[-1], 1)
    return {"Q": ((a.mT - a) / 2)[..., rows, cols], "s": p.tensors["s"].flatten()}


def boft_out(m: Made) -> Tensors:
    gain = m.tensors.get("s")
    s = torch.ones(m.site.out, device=m.tensors["Q"].device) if gain is None else gain
    return {"Q": skew(-m.tensors["Q"], m.method.block), "s": s.unsqueeze(1)}


# -- places of a matrix -------------------------------------------------------------------------------------------------
def sparse_in(p: Place) -> Tensors:
    rows, cols = p.tensors["index"].long()
    index, order = (rows * p.site.inp + cols).sort()
    return {"index": index.int(), "values": p.tensors["values"][order]}


def sparse_out(m: Made) -> Tensors:
    index = m.tensors["index"]
    return {"values": m.tensors["values"], "index": torch.stack([index // m.site.inp, index % m.site.inp]).int()}


def sparse_fields(m: Made) -> dict[str, Any]:
    r, rest = divmod(m.tensors["values"].numel(), m.site.inp + m.site.out)
    if rest or not r:
        n = m.tensors["values"].numel()
        raise CapabilityError(
            f"PEFT's SHIRA counts entries as r (in + out), and {m.site.path!r} has {n}", fix="Choose r entries a row and column: vn.RandomMask(r=…)"
        )
    return {"r": r, "mask_type": "random"}


def rows_of(at: Any, ids: Tensor) -> Tensor:
    w = at.module._parameters["weight"].detach()
    return w[ids.to(w.device)].to(at.tensors["delta"].device)


def tokens(p: Place) -> list[int]:
    ids = p.source.config.get("token_indices")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < p.site.inp for i in ids):
        raise p.source.fail(f"token_indices={ids!r} are not ids of the {p.site.inp} tokens here", "Resize the embeddings: model.resize_token_embeddings(n)")
    return ids


def tokens_in(p: Place) -> Tensors:
    ids, order = torch.tensor(tokens(p)).sort()
    return {"delta": p.tensors["delta"][order] - rows_of(p, ids), "ids": ids.int()}


# -- banks and blocks ---------------------------------------------------------------------------------------------------
def granular_in(p: Place) -> Tensors:
    k = p.tensors["A"].shape[0]
    return {"A": p.tensors["A"].unflatten(2, (k, -1)).permute(0, 2, 3, 1), "B": p.tensors["B"].unflatten(1, (k, -1))}


def granular_out(m: Made) -> Tensors:
    return {"A": m.tensors["A"].permute(0, 3, 1, 2).flatten(2), "B": m.tensors["B"].flatten(1, 2)}


def glora_paths(site: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the zeros that PEFT keeps for a path that is not there."""
    return {"A": (site.out, site.inp), "B": (site.out, site.inp), "C": (site.inp, 1), "D": (site.out,), "E": (site.out,)}


def glora_in(p: Place) -> Tensors:
    """Vectors as vectors, and nothing for zeros."""
    for name, shape in glora_paths(p.site).items():
        own = {k: v for k, v in p.tensors.items() if k.startswith(name)}
        if not own or any(k.endswith("_0") and (v.shape != shape or bool(v.any())) for k, v in own.items()):
            raise KeyError(name)
    return {k: v if k[1:] else v.flatten() for k, v in p.tensors.items() if not k.endswith("_0")}


def glora_out(m: Made) -> Tensors:
    t, o = m.tensors, m.method
    out = {k: v.unsqueeze(1) if k == "C" or k in "AB" and o.ab == "vector" else v for k, v in t.items()}
    new = next(iter(t.values())).new_zeros
    return out | {f"{n}_0": new(shape) for n, shape in glora_paths(m.site).items() if n not in t and f"{n}_d" not in t}


def glora_fields(m: Made) -> dict[str, Any]:
    return {"r": m.method.r, "config_A_B": m.method.ab, "config_C": m.method.c, "config_D_E": m.method.de}


def group(i: int, order: list[str], source: Source | None) -> int:
    """PEFT's: the modules are cut into as many runs as weight_tying leaves."""
    n = len(order)
    groups = max(1, round(n * (1 - source.number("weight_tying", 0.0)))) if source is not None else n
    return min(i // max(1, n // groups), groups - 1)


def tiny_out(m: Made) -> Tensors:
    return {**m.tensors, "v": m.part.shared(m.part.shares).detach() if m.part.shares else m.tensors["v"]}


def dealt(p: Place) -> Tensors:
    """The indices, and on the way the bank's `norm`, which PEFT spells out for every index."""
    norm = p.roots.setdefault("norm", torch.zeros(p.roots["theta"].numel()))
    for side in "AB":
        index, scale = p.tensors[f"index_{side}"].long(), p.tensors[f"scale_{side}"].to(norm)
        if bool((index < 0).any()) or bool(((norm[index] != 0) & (norm[index] != scale)).any()):
            raise p.source.fail(f"the indices of {p.path!r} are negative, or one of them has two scales", "The file is damaged; take another copy")
        norm[index] = scale
    return {k: v.int() for k, v in p.tensors.items() if k.startswith("index")}


def dealt_out(m: Made) -> Tensors:
    sides = {s: m.tensors[f"index_{s}"].long() for s in "AB"}
    return {**{f"index_{s}": i for s, i in sides.items()}, **{f"scale_{s}": m.part.bank.norm[i] for s, i in sides.items()}}


def llama_in(p: Place) -> Tensors:
    g = p.tensors["g"]
    if bool((g.abs() >= 1).any()):
        raise p.source.fail(f"the gate at {p.path!r} is {float(g.flatten()[0]):.3g}, and tanh(g) here stays within 1", "Use it with PEFT")
    return {"g": torch.atanh(g.flatten()), "prompt": p.tensors["prompt"][0]}


def llama_fields(m: Made) -> dict[str, Any]:
    if m.method.per_head:
        raise CapabilityError("PEFT's ADAPTION_PROMPT has one gate a layer", fix="Train it as vn.LlamaAdapter(n, per_head=False)")
    return {"adapter_len": m.method.length}


def llama_layers(made: list[Made]) -> dict[str, Any]:
    towers = [s for s in resolve.sites(made[0].model) if s.port == "kv"]
    if [m.site for m in made] != towers[-len(made) :]:
        raise CapabilityError("PEFT's ADAPTION_PROMPT is in the topmost layers, with none left out", fix=f"Train it at 'attn@-{len(made)}:', or: {NATIVE}")
    return {"adapter_layers": len(made), "target_modules": made[0].site.path.rpartition(".")[2]}  # the end of a path, and no list


def llama_out(m: Made) -> Tensors:
    return {"g": torch.tanh(m.tensors["g"]), "prompt": m.tensors["prompt"][None]}
