"""The types that are tables: what PEFT calls the tensors and fields of a method, and what we do."""

from __future__ import annotations

from ..methods import (
    BEFT,
    BOFT,
    C3A,
    DEFT,
    HRA,
    OFT,
    AdaLoRA,
    DeLoRA,
    FourierFT,
    GLoRA,
    GraLoRA,
    HiRA,
    LlamaAdapter,
    LoHa,
    LoKr,
    MiSS,
    PEANuT,
    RandLoRA,
    RandomMask,
    RoAd,
    TinyLoRA,
    TrainableTokens,
    UniLoRA,
    VBLoRA,
    VeRA,
)
from .further import FURTHER
from .layouts import (
    adalora,
    adalora_fields,
    adalora_out,
    adalora_ranks,
    alpha_of,
    boft_in,
    boft_out,
    dealt,
    dealt_out,
    glora_fields,
    glora_in,
    glora_out,
    granular_in,
    granular_out,
    group,
    llama_fields,
    llama_in,
    llama_layers,
    llama_out,
    oft,
    oft_fields,
    oft_in,
    rank_alpha,
    rows_of,
    sparse_fields,
    sparse_in,
    sparse_out,
    tiny_out,
    tokens,
    tokens_in,
    triplets,
)
from .table import Form

RANK_ALPHA = {"r": "rank_pattern", "alpha": "alpha_pattern"}

GLORA = (("ab", "config_A_B", "lora"), ("c", "config_C", "lora"), ("de", "config_D_E", "constant"))
PATHS = {k: k for k in ("lora", "vector", "constant", "none")}

SIDES = (("encoders", "E"), ("decoders", "D"))  # of PEANuT
ACTS_OUT = {n: n for n in ("relu", "gelu", "swish", "silu", "tanh", "sigmoid")} | {"leakyrelu": "leaky_relu", "identity": "linear"}
ACTS = {theirs: ours for ours, theirs in ACTS_OUT.items()}

BOTH = ("linear", "transposed")  # torch's Linear, and transformers' Conv1D, which the other types do not take

FORMS = (
    Form(
        "ADALORA", AdaLoRA, {"lora_A": "A", "lora_B": "B", "lora_E": "E"}, adalora, adalora_fields, enter=triplets, leave=adalora_out,
        reads="init_r r target_r lora_alpha lora_dropout deltaT beta1 beta2 orth_reg_weight total_step tinit tfinal rank_pattern",
        fixed={"use_dora": False, "use_rslora": False}, kinds=("linear", "transposed", "conv"),
        overall=adalora_ranks,
    ),
    Form(
        "VERA", VeRA, {"vera_lambda_d": "d", "vera_lambda_b": "b"},
        lambda p: {"r": p.whole("r", 256), "start": p.number("d_initial", 0.1), "dropout": p.number("vera_dropout", 0.0)},
        lambda m: {"r": m.method.r, "d_initial": m.method.start, "vera_dropout": m.method.dropout, "save_projection": True},
        roots={"vera_A": "A", "vera_B": "B"}, reads="r d_initial vera_dropout save_projection projection_prng_key", kinds=BOTH,
    ),
    Form(
        "LOHA", LoHa, {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}, rank_alpha,
        lambda m: {"r": m.method.r, "alpha": alpha_of(m.method, m.method.r)}, RANK_ALPHA,
        reads="init_weights rank_dropout module_dropout use_effective_conv2d", kinds=("linear", "conv"),
    ),
    Form(
        "LOKR", LoKr, {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        lambda p: {**rank_alpha(p), "factor": p.number("decompose_factor", -1), "decompose_both": p.source.flag("decompose_both")},
        lambda m: {
            "r": m.method.r, "alpha": alpha_of(m.method, m.method.r), "decompose_factor": m.method.factor, "decompose_both": m.method.decompose_both
        }, RANK_ALPHA, reads="decompose_factor decompose_both rank_dropout rank_dropout_scale module_dropout use_effective_conv2d",
    ),
    Form(
        "OFT", OFT, {"oft_R.weight": "Q"}, oft, oft_fields, enter=oft_in,
        leave=lambda m: {"Q": m.tensors["Q"] if m.method.series is not None else -m.tensors["Q"]},
        reads="r oft_block_size block_share coft eps use_cayley_neumann num_cayley_neumann_terms module_dropout",
    ),
    Form(
        "BOFT", BOFT, {"boft_R": "Q", "boft_s": "s"}, lambda p: {"block": p.tensors["Q"].shape[-1]},
        lambda m: {"boft_block_size": m.method.block, "boft_block_num": 0, "boft_n_butterfly_factor": m.method.factors}, enter=boft_in, leave=boft_out,
        reads="boft_block_size boft_block_num boft_dropout", fixed={"boft_n_butterfly_factor": 1},  # without its CUDA extension PEFT takes others for 1
    ),
    Form(
        "HRA", HRA, {"hra_u": "U"}, lambda p: {"r": p.whole("r", 8)}, lambda m: {"r": m.method.r}, reads="r", fixed={"apply_GS": False},
    ),
    Form(
        "SHIRA", RandomMask, {"shira_weight": "values", "shira_indices": "index"}, lambda p: {"r": p.whole("r", 32)}, sparse_fields,
        enter=sparse_in, leave=sparse_out, reads="r mask_type random_seed", also=("magnitude", "gradient", "fisher", "lottery"),
    ),
    Form(
        "TRAINABLE_TOKENS", TrainableTokens, {"trainable_tokens_delta": "delta"}, lambda p: {"tokens": tuple(sorted(tokens(p)))},
        lambda m: {"token_indices": m.tensors["ids"].tolist()}, enter=tokens_in,
        leave=lambda m: {"delta": m.tensors["delta"] + rows_of(m, m.tensors["ids"].long())}, reads="token_indices", kinds=("embedding",), reads_base=True,
    ),
    Form(
        "FOURIERFT", FourierFT, {"fourierft_spectrum": "c"},
        lambda p: {"n": p.whole("n_frequency", 1000), "scale": p.number("scaling", 150.0), "seed": p.number("random_loc_seed", 777)},
        lambda m: {"n_frequency": m.method.n, "scaling": m.method.scale, "random_loc_seed": m.method.seed}, {"n_frequency": "n_frequency_pattern"},
        reads="scaling random_loc_seed", kinds=BOTH,
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
        fixed={"save_only_topk_weights": False}, kinds=BOTH,
    ),
    Form(
        "RANDLORA", RandLoRA, {"randlora_lambda": "lambdas", "randlora_gamma": "gammas", "randlora_A": "", "randlora_B": ""},
        lambda p: {"r": p.whole("r", 32), "alpha": p.number("randlora_alpha", 640), "dropout": p.number("randlora_dropout", 0.0)},
        lambda m: {"r": m.method.r, "randlora_alpha": alpha_of(m.method, 20 * m.method.r), "randlora_dropout": m.method.dropout, "save_projection": True},
        roots={"randlora_A": "A", "randlora_B": "B"}, reads="r randlora_alpha randlora_dropout save_projection projection_prng_key sparse very_sparse",
        enter=lambda p: {k: v for k, v in p.tensors.items() if k}, kinds=BOTH,  # each module has the shared matrices once more
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
        "UNILORA", UniLoRA, {f"unilora_{theirs}_{s}": f"{ours}_{s}" for theirs, ours in (("indices", "index"), ("scales", "scale")) for s in "AB"},
        lambda p: {"r": p.whole("r", 4), "length": p.whole("theta_d_length", 256), "dropout": p.number("unilora_dropout", 0.0)},
        lambda m: {"r": m.method.r, "theta_d_length": m.method.length, "unilora_dropout": m.method.dropout, "save_indices": True},
        roots={"unilora_theta_d": "theta"}, enter=dealt, leave=dealt_out, hint="save_indices=True",
        reads="r theta_d_length unilora_dropout save_indices proj_seed init_theta_d_bound", kinds=BOTH,
    ),
    Form(
        "TINYLORA", TinyLoRA, {f"tinylora_{n}": n for n in "ABP"},
        lambda p: {"r": p.whole("r", 2), "u": p.whole("u", 64), "dropout": p.number("tinylora_dropout", 0.0)},
        lambda m: {"r": m.method.r, "u": m.method.u, "tinylora_dropout": m.method.dropout, "weight_tying": 0.0, "save_projection": True},
        enter=lambda p: {k: p.tensors[k] for k in "ABPv"}, leave=tiny_out, numbered={"tinylora_v": "v"}, group=group,
        reads="r u tinylora_dropout weight_tying save_projection projection_seed init_v_bound", kinds=BOTH,
    ),
    Form(
        "GRALORA", GraLoRA, {"gralora_A": "A", "gralora_B": "B"},
        lambda p: {"r": p.whole("r", 32), "k": p.whole("gralora_k", 2), "alpha": p.number("alpha", 64)},
        lambda m: {"r": m.method.r, "gralora_k": m.method.k, "alpha": alpha_of(m.method, 2 * m.method.r)}, enter=granular_in, leave=granular_out,
        reads="r gralora_k alpha gralora_dropout", fixed={"hybrid_r": 0}, kinds=BOTH,
    ),
    Form(
        "DELORA", DeLoRA, {"delora_A": "A", "delora_B": "B", "delora_lambda": "bound", "delora_w_norm": "norm"},
        lambda p: {"r": p.whole("r", 8), "bound": p.number("delora_lambda", 15)}, lambda m: {"r": m.method.r, "delora_lambda": m.method.bound},
        {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}, reads="module_dropout",
    ),
    Form(
        "ADAPTION_PROMPT", LlamaAdapter, {"adaption_prompt": "prompt", "adaption_gate": "g"},
        lambda p: {"length": p.whole("adapter_len", 0), "per_head": False}, llama_fields, enter=llama_in, leave=llama_out, overall=llama_layers,
        reads="adapter_len adapter_layers", port="kv",
    ),
    Form(
        "PEANUT", PEANuT, {"peanut_A.weight": "A", "peanut_B.weight": "B", **{f"peanut_{k}.{i}.weight": f"{n}.{i}" for k, n in SIDES for i in range(64)}},
        lambda p: {
            "r": p.whole("r", 32), "layers": p.source.count("depth", 0), "scale": p.number("scaling", 1.0), "activation": p.one_of("act_fn", "relu", ACTS)
        },
        lambda m: {"r": m.method.r, "depth": m.method.layers, "scaling": m.method.scale, "act_fn": ACTS_OUT[m.method.activation]},
        reads="r depth scaling act_fn",
    ),
    Form(
        "DEFT", DEFT, {"deft_P": "P", "deft_R": "R"},
        lambda p: {
            "r": p.tensors["P"].shape[1], "projection": p.one_of("decomposition_method", "relu", {k: k for k in ("relu", "qr")}),
            "alpha": p.number("alpha", 0) or None if p.source.config.get("alpha") is not None else None, "inject": not p.source.flag("para"),
        },
        lambda m: {"r": m.method.r, "decomposition_method": m.method.projection, "alpha": m.method.alpha, "para": not m.method.inject},
        reads="r decomposition_method alpha para init_scale deft_dropout", kinds=BOTH,
    ),
    Form(
        "GLORA", GLoRA, {f"glora_{n}.{e}": f"{n}{ours}" for n in "ABCDE" for e, ours in (("Xd", "_d"), ("Xu", "_u"), ("X", ""), ("zeros", "_0"))},
        lambda p: {"r": p.whole("r", 8), **{ours: p.one_of(theirs, first, PATHS) for ours, theirs, first in GLORA}}, glora_fields,
        enter=glora_in, leave=glora_out, reads="r config_A_B config_C config_D_E",
    ),
    Form(
        "HIRA", HiRA, {"hira_A": "A", "hira_B": "B"}, lambda p: {"r": p.tensors["A"].shape[0]}, lambda m: {"r": m.method.r},
        reads="r rank_pattern hira_dropout", kinds=BOTH,  # PEFT writes the pattern, and does not heed it when it loads
    ),
    *FURTHER,
)  # fmt: skip
