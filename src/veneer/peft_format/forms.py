"""The types that are tables: what PEFT calls the tensors and fields of a method, and what we do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import resolve
from ..errors import CapabilityError
from ..methods import (
    BEFT,
    BOFT,
    C3A,
    HRA,
    OFT,
    AdaLoRA,
    DeLoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LlamaAdapter,
    LoHa,
    LoKr,
    MiSS,
    RandLoRA,
    RandomMask,
    RoAd,
    TrainableTokens,
    VBLoRA,
    VeRA,
)
from ..methods.orthogonal import skew
from .table import NATIVE, Form, Made, Place, Tensors

RANK_ALPHA = {"r": "rank_pattern", "alpha": "alpha_pattern"}
INIT = "r alpha init_weights"


def _rank_alpha(p: Place) -> dict[str, Any]:
    return {"r": p.whole("r", 8), "alpha": p.number("alpha", 8)}


def _alpha(m: Any, default: float) -> float:
    return default if m.alpha is None else m.alpha


# -- AdaLoRA: the scale is lora_alpha / (init_r + 1e-5), and each module keeps its own number of triplets ---------------
def _adalora(p: Place) -> dict[str, Any]:
    r, first = p.tensors["A"].shape[0], p.whole("init_r", 12)
    alpha = p.number("lora_alpha", 8)
    return {
        "r": max(1, r), "target": max(1, min(r, p.whole("target_r", 8))), "alpha": (alpha if alpha > 0 else first) * r / (first + 1e-5),
        "dropout": p.number("lora_dropout", 0.0), "every": p.whole("deltaT", 1), "beta1": p.number("beta1", 0.85), "beta2": p.number("beta2", 0.85),
        "orthogonal": p.number("orth_reg_weight", 0.5),
    }  # fmt: skip


def _triplets(p: Place) -> Tensors:
    e = p.tensors["E"].flatten()
    return {**p.tensors, "E": e, "kept": torch.ones(len(e), dtype=torch.bool)} if len(e) else {}  # all triplets are gone: nothing is added


def _adalora_out(m: Made) -> Tensors:
    r, alpha = m.part.E.shape[0], _alpha(m.method, m.method.r)
    return {**m.tensors, "E": (m.tensors["E"] * (m.part.scale * (r + 1e-5) / alpha)).unsqueeze(1)}


def _adalora_fields(m: Made) -> dict[str, Any]:
    a, steps = m.method, 1000  # PEFT counts steps, and we shares of a run: those of one with this many
    return {
        "init_r": a.r, "r": a.r, "target_r": a.target, "lora_alpha": _alpha(a, a.r), "lora_dropout": a.dropout, "deltaT": a.every, "beta1": a.beta1,
        "beta2": a.beta2, "orth_reg_weight": a.orthogonal, "total_step": steps, "tinit": int(a.warmup * steps), "tfinal": int(a.final * steps),
    }  # fmt: skip


# -- rotations ----------------------------------------------------------------------------------------------------------
def _oft(p: Place) -> dict[str, Any]:
    block = (1 + math.isqrt(1 + 8 * p.tensors["Q"].shape[1])) // 2
    series = p.whole("num_cayley_neumann_terms", 5) if p.source.flag("use_cayley_neumann") else None
    return {"block": block, "shared": p.source.flag("block_share"), "series": series, "constrain": p.number("eps", 6e-5) if p.source.flag("coft") else None}


def _oft_in(p: Place) -> Tensors:
    # PEFT's exact form is the inverse of its series': (1 - Q)(1 + Q)⁻¹
    return {"Q": p.tensors["Q"] if p.source.flag("use_cayley_neumann") else -p.tensors["Q"]}


def _oft_fields(m: Made) -> dict[str, Any]:
    o = m.method
    return {
        "r": 0, "oft_block_size": o.block, "block_share": o.shared, "use_cayley_neumann": o.series is not None, "num_cayley_neumann_terms": o.series or 5,
        "coft": o.constrain is not None, "eps": 6e-5 if o.constrain is None else o.constrain,
    }  # fmt: skip


def _boft_in(p: Place) -> Tensors:
    a = p.tensors["Q"]
    rows, cols = torch.triu_indices(a.shape[-1], a.shape[-1], 1)
    return {"Q": ((a.mT - a) / 2)[..., rows, cols], "s": p.tensors["s"].flatten()}


def _boft_out(m: Made) -> Tensors:
    gain = m.tensors.get("s")
    s = torch.ones(m.site.out, device=m.tensors["Q"].device) if gain is None else gain
    return {"Q": skew(-m.tensors["Q"], m.method.block), "s": s.unsqueeze(1)}


# -- places of a matrix -------------------------------------------------------------------------------------------------
def _sparse_in(p: Place) -> Tensors:
    rows, cols = p.tensors["index"].long()
    index, order = (rows * p.site.inp + cols).sort()
    return {"index": index.int(), "values": p.tensors["values"][order]}


def _sparse_out(m: Made) -> Tensors:
    index = m.tensors["index"]
    return {"values": m.tensors["values"], "index": torch.stack([index // m.site.inp, index % m.site.inp]).int()}


def _sparse_fields(m: Made) -> dict[str, Any]:
    r, rest = divmod(m.tensors["values"].numel(), m.site.inp + m.site.out)
    if rest or not r:
        n = m.tensors["values"].numel()
        raise CapabilityError(
            f"PEFT's SHIRA counts entries as r (in + out), and {m.site.path!r} has {n}", fix="Choose r entries a row and column: vn.RandomMask(r=…)"
        )
    return {"r": r, "mask_type": "random"}


def _rows(at: Any, ids: Tensor) -> Tensor:
    w = at.module._parameters["weight"].detach()
    return w[ids.to(w.device)].to(at.tensors["delta"].device)


def _tokens(p: Place) -> list[int]:
    ids = p.source.config.get("token_indices")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < p.site.inp for i in ids):
        raise p.source.fail(f"token_indices={ids!r} are not ids of the {p.site.inp} tokens here", "Resize the embeddings: model.resize_token_embeddings(n)")
    return ids


def _tokens_in(p: Place) -> Tensors:
    ids, order = torch.tensor(_tokens(p)).sort()
    return {"delta": p.tensors["delta"][order] - _rows(p, ids), "ids": ids.int()}


# -- banks and blocks ---------------------------------------------------------------------------------------------------
def _granular_in(p: Place) -> Tensors:
    k = p.tensors["A"].shape[0]
    return {"A": p.tensors["A"].unflatten(2, (k, -1)).permute(0, 2, 3, 1), "B": p.tensors["B"].unflatten(1, (k, -1))}


def _granular_out(m: Made) -> Tensors:
    return {"A": m.tensors["A"].permute(0, 3, 1, 2).flatten(2), "B": m.tensors["B"].flatten(1, 2)}


def _llama_in(p: Place) -> Tensors:
    g = p.tensors["g"]
    if bool((g.abs() >= 1).any()):
        raise p.source.fail(f"the gate at {p.path!r} is {float(g.flatten()[0]):.3g}, and tanh(g) here stays within 1", "Use it with PEFT")
    return {"g": torch.atanh(g.flatten()), "prompt": p.tensors["prompt"][0]}


def _llama_fields(m: Made) -> dict[str, Any]:
    if m.method.per_head:
        raise CapabilityError("PEFT's ADAPTION_PROMPT has one gate a layer", fix="Train it as vn.LlamaAdapter(n, per_head=False)")
    return {"adapter_len": m.method.length}


def _llama_layers(made: list[Made]) -> dict[str, Any]:
    towers = [s for s in resolve.sites(made[0].model) if s.port == "kv"]
    if [m.site for m in made] != towers[-len(made) :]:
        raise CapabilityError("PEFT's ADAPTION_PROMPT is in the topmost layers, with none left out", fix=f"Train it at 'attn@-{len(made)}:', or: {NATIVE}")
    return {"adapter_layers": len(made), "target_modules": made[0].site.path.rpartition(".")[2]}  # the end of a path, and no list


def _llama_out(m: Made) -> Tensors:
    return {"g": torch.tanh(m.tensors["g"]), "prompt": m.tensors["prompt"][None]}


FORMS = (
    Form(
        "ADALORA", AdaLoRA, {"lora_A": "A", "lora_B": "B", "lora_E": "E"}, _adalora, _adalora_fields, enter=_triplets, leave=_adalora_out,
        reads="init_r r target_r lora_alpha lora_dropout deltaT beta1 beta2 orth_reg_weight total_step tinit tfinal rank_pattern",
        fixed={"use_dora": False, "use_rslora": False},
    ),
    Form(
        "VERA", VeRA, {"vera_lambda_d": "d", "vera_lambda_b": "b"},
        lambda p: {"r": p.whole("r", 256), "start": p.number("d_initial", 0.1), "dropout": p.number("vera_dropout", 0.0)},
        lambda m: {"r": m.method.r, "d_initial": m.method.start, "vera_dropout": m.method.dropout, "save_projection": True},
        roots={"vera_A": "A", "vera_B": "B"}, reads="r d_initial vera_dropout save_projection projection_prng_key",
    ),
    Form(
        "LOHA", LoHa, {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}, _rank_alpha,
        lambda m: {"r": m.method.r, "alpha": _alpha(m.method, m.method.r)}, RANK_ALPHA,
        reads="init_weights rank_dropout module_dropout use_effective_conv2d",
    ),
    Form(
        "LOKR", LoKr, {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        lambda p: {**_rank_alpha(p), "factor": p.number("decompose_factor", -1), "decompose_both": p.source.flag("decompose_both")},
        lambda m: {
            "r": m.method.r, "alpha": _alpha(m.method, m.method.r), "decompose_factor": m.method.factor, "decompose_both": m.method.decompose_both
        }, RANK_ALPHA, reads="decompose_factor decompose_both rank_dropout rank_dropout_scale module_dropout use_effective_conv2d",
    ),
    Form(
        "OFT", OFT, {"oft_R.weight": "Q"}, _oft, _oft_fields, enter=_oft_in,
        leave=lambda m: {"Q": m.tensors["Q"] if m.method.series is not None else -m.tensors["Q"]},
        reads="r oft_block_size block_share coft eps use_cayley_neumann num_cayley_neumann_terms module_dropout",
    ),
    Form(
        "BOFT", BOFT, {"boft_R": "Q", "boft_s": "s"}, lambda p: {"block": p.tensors["Q"].shape[-1]},
        lambda m: {"boft_block_size": m.method.block, "boft_block_num": 0, "boft_n_butterfly_factor": m.method.factors}, enter=_boft_in, leave=_boft_out,
        reads="boft_block_size boft_block_num boft_dropout", fixed={"boft_n_butterfly_factor": 1},  # without its CUDA extension PEFT takes others for 1
    ),
    Form(
        "HRA", HRA, {"hra_u": "U"}, lambda p: {"r": p.whole("r", 8)}, lambda m: {"r": m.method.r}, reads="r", fixed={"apply_GS": False},
    ),
    Form(
        "SHIRA", RandomMask, {"shira_weight": "values", "shira_indices": "index"}, lambda p: {"r": p.whole("r", 32)}, _sparse_fields,
        enter=_sparse_in, leave=_sparse_out, reads="r mask_type random_seed", also=("magnitude", "gradient", "fisher", "lottery"),
    ),
    Form(
        "TRAINABLE_TOKENS", TrainableTokens, {"trainable_tokens_delta": "delta"}, lambda p: {"tokens": tuple(sorted(_tokens(p)))},
        lambda m: {"token_indices": m.tensors["ids"].tolist()}, enter=_tokens_in,
        leave=lambda m: {"delta": m.tensors["delta"] + _rows(m, m.tensors["ids"].long())}, reads="token_indices", kinds=("embedding",), reads_base=True,
    ),
    Form(
        "FOURIERFT", FourierFT, {"fourierft_spectrum": "c"},
        lambda p: {"n": p.whole("n_frequency", 1000), "scale": p.number("scaling", 150.0), "seed": p.number("random_loc_seed", 777)},
        lambda m: {"n_frequency": m.method.n, "scaling": m.method.scale, "random_loc_seed": m.method.seed}, {"n_frequency": "n_frequency_pattern"},
        reads="scaling random_loc_seed",
    ),
    Form(
        "VBLORA", VBLoRA, {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"},
        lambda p: {
            "r": p.whole("r", 4), "vectors": p.whole("num_vectors", 256), "length": p.whole("vector_length", 256), "k": p.whole("topk", 2),
            "dropout": p.number("vblora_dropout", 0.0),
        },
        lambda m: {
            "r": m.method.r, "num_vectors": m.method.vectors, "vector_length": m.method.length, "topk": m.method.k, "vblora_dropout": m.method.dropout
        },
        roots={"vblora_vector_bank": "v"}, reads="r num_vectors vector_length topk vblora_dropout init_vector_bank_bound init_logits_std",
        fixed={"save_only_topk_weights": False},
    ),
    Form(
        "RANDLORA", RandLoRA, {"randlora_lambda": "lambdas", "randlora_gamma": "gammas", "randlora_A": "", "randlora_B": ""},
        lambda p: {"r": p.whole("r", 32), "alpha": p.number("randlora_alpha", 640), "dropout": p.number("randlora_dropout", 0.0)},
        lambda m: {"r": m.method.r, "randlora_alpha": _alpha(m.method, 20 * m.method.r), "randlora_dropout": m.method.dropout, "save_projection": True},
        roots={"randlora_A": "A", "randlora_B": "B"}, reads="r randlora_alpha randlora_dropout save_projection projection_prng_key sparse very_sparse",
        enter=lambda p: {k: v for k, v in p.tensors.items() if k},  # each module has the shared matrices once more
    ),
    Form(
        "C3A", C3A, {"c3a_kernel": "w"}, lambda p: {"block": p.whole("block_size", 256)}, lambda m: {"block_size": m.method.block},
        {"block_size": "block_size_pattern"},
    ),
    Form(
        "MISS", MiSS, {"miss_block": "D"},
        lambda p: {"r": p.whole("r", 64), "mini": p.whole("mini_r", 1) if p.one_of("init_weights", True, {True: False, False: False, "mini": True}) else None},
        lambda m: {"r": m.method.r, "mini_r": m.method.mini or 1, "init_weights": "mini" if m.method.mini else True}, reads="r mini_r miss_dropout",
    ),
    Form(
        "ROAD", RoAd, {"road_theta": "theta", "road_alpha": "alpha"},
        lambda p: {"variant": p.one_of("variant", "road_1", {f"road_{n}": n for n in (1, 2, 4)}), "group": p.whole("group_size", 64)},
        lambda m: {"variant": f"road_{m.method.variant}", "group_size": m.part.group}, reads="variant group_size",
    ),
    Form(
        "BEFT", BEFT, {"beft_bias": "delta"}, lambda p: {}, lambda m: {}, enter=lambda p: {"delta": p.tensors["delta"].flatten()},
        leave=lambda m: {"delta": m.tensors["delta"][None]},
    ),
    Form(
        "GRALORA", GraLoRA, {"gralora_A": "A", "gralora_B": "B"},
        lambda p: {"r": p.whole("r", 32), "k": p.whole("gralora_k", 2), "alpha": p.number("alpha", 64)},
        lambda m: {"r": m.method.r, "gralora_k": m.method.k, "alpha": _alpha(m.method, 2 * m.method.r)}, enter=_granular_in, leave=_granular_out,
        reads="r gralora_k alpha gralora_dropout", fixed={"hybrid_r": 0},
    ),
    Form(
        "DELORA", DeLoRA, {"delora_A": "A", "delora_B": "B", "delora_lambda": "bound", "delora_w_norm": "norm"},
        lambda p: {"r": p.whole("r", 8), "bound": p.number("delora_lambda", 15)}, lambda m: {"r": m.method.r, "delora_lambda": m.method.bound},
        {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}, reads="module_dropout",
    ),
    Form(
        "ADAPTION_PROMPT", LlamaAdapter, {"adaption_prompt": "prompt", "adaption_gate": "g"},
        lambda p: {"length": p.whole("adapter_len", 0), "per_head": False}, _llama_fields, enter=_llama_in, leave=_llama_out, overall=_llama_layers,
        reads="adapter_len adapter_layers", port="kv",
    ),
    Form(
        "HIRA", HiRA, {"hira_A": "A", "hira_B": "B"}, lambda p: {"r": p.tensors["A"].shape[0]}, lambda m: {"r": m.method.r},
        reads="r rank_pattern hira_dropout",  # PEFT writes the pattern, and does not heed it when it loads
    ),
)  # fmt: skip
