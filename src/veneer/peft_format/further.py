"""Further types that are tables, each with what it needs beyond names."""

from __future__ import annotations

from typing import Any

from ..errors import CapabilityError
from ..methods import Poly, PVeRA, SuperTuning, WaveFT
from .table import NATIVE, Form, Made, Place, Tensors

BOTH = ("linear", "transposed")
WAVELETS = {*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3"}
OTHERS = "PEFT's coif4 and coif5 are other filters than those wavelets', and of the rest it has db1 to db10, sym2 to sym10 and coif1 to coif3"


# -- wavelets -----------------------------------------------------------------------------------------------------------
def waves(p: Place) -> dict[str, Any]:
    family = p.source.config.get("wavelet_family", "db1") if p.source.config.get("use_idwt", True) else None
    if family is not None and family not in WAVELETS:
        raise p.source.fail(f"wavelet_family={family!r} cannot be read here: {OTHERS}", "Merge it with PEFT")
    n = p.tensors["c"].numel() if p.source.flag("proportional_parameters") else p.whole("n_frequency", 2592)
    return {"n": n, "scale": p.number("scaling", 25.0), "wavelet": family, "seed": p.number("random_loc_seed", 777)}


def wave_fields(m: Made) -> dict[str, Any]:
    w = m.method
    if w.wavelet is not None and w.wavelet not in WAVELETS:
        raise CapabilityError(f"PEFT's WAVEFT cannot have wavelet={w.wavelet!r}: {OTHERS}", fix=NATIVE)
    family, idwt = w.wavelet or "db1", w.wavelet is not None
    return {"n_frequency": w.n, "scaling": w.scale, "random_loc_seed": w.seed, "wavelet_family": family, "use_idwt": idwt, "proportional_parameters": False}


# -- sparse and low-rank ------------------------------------------------------------------------------------------------
def supra(p: Place) -> dict[str, Any]:
    low = {}
    if p.source.config.get("r") is not None:
        low = {"r": p.whole("r", 8), "alpha": p.number("lora_alpha", 2 * p.whole("r", 8)), "dropout": p.number("lora_dropout", 0.0)}
    return {"share": round(1 - p.number("sparsity", 0.99), 12), "smallest": not p.source.config.get("select_top", True), **low}


def supra_in(p: Place) -> Tensors:
    values, index = p.tensors["values"], p.tensors.get("index")
    if index is None and not p.source.config.get("save_precomputed_indices", True):  # the base's largest, in their order
        w = p.module._parameters["weight"].detach()
        index = w.abs().flatten().topk(len(values), largest=p.source.config.get("select_top", True)).indices.to(values.device)
    low = p.source.config.get("r") is not None
    if index is None or not len(index) == len(values) == entries(p.site, p.number("sparsity", 0.99)) or ("A" in p.tensors) != low or ("B" in p.tensors) != low:
        raise ValueError("tensors that do not fit each other")
    order = index.argsort()
    return {**p.tensors, "index": index[order].int(), "values": values[order]}


def entries(site: Any, sparsity: float) -> int:
    return int(site.out * site.inp * (1 - sparsity))


def supra_fields(m: Made) -> dict[str, Any]:
    s = m.method
    low = {"r": s.r, "lora_alpha": 2 * s.r if s.alpha is None else s.alpha, "lora_dropout": s.dropout} if s.r else {"r": None}
    return {"select_top": not s.smallest, "save_precomputed_indices": True, **low}


def sparsity(made: list[Made]) -> dict[str, Any]:
    """One sparsity from which PEFT counts every map's entries: the shares that do form a range."""
    counts = [(m, m.tensors["values"].numel(), m.site.out * m.site.inp) for m in made]
    low, high = max(k / n for _, k, n in counts), min((k + 1) / n for _, k, n in counts)
    for value in (round(1 - made[0].method.share, 12), 1 - (low + high) / 2):
        if all(entries(m.site, value) == k for m, k, _ in counts):
            return {"sparsity": value}
    path, k = made[0].site.path, counts[0][1]
    raise CapabilityError(f"PEFT's SUPERTUNING has one share for all modules, and none gives the {k} entries of {path!r} and the others' too", fix=NATIVE)


# -- skills -------------------------------------------------------------------------------------------------------------
def skills(p: Place) -> dict[str, Any]:
    tasks = p.tensors["z"].shape[0]
    if tasks > 1 or p.whole("n_tasks", 1) > 1:
        fix = "Make a file of each: its row alone of every poly_router.module_logits, and n_tasks=1"
        raise p.source.fail(f"the file holds {tasks} tasks, and an adapter here is one", fix)
    return {"r": p.whole("r", 8), "skills": p.whole("n_skills", 4), "splits": p.whole("n_splits", 1)}


def skills_in(p: Place) -> Tensors:
    return {"A": p.tensors["A"].mT, "B": p.tensors["B"].mT, "z": p.tensors["z"].reshape(p.whole("n_splits", 1), -1)}


def skills_out(m: Made) -> Tensors:
    return {"A": m.tensors["A"].mT, "B": m.tensors["B"].mT * m.method.alpha, "z": m.tensors["z"].flatten()[None]}


FURTHER = (
    Form(
        "WAVEFT", WaveFT, {"waveft_spectrum": "c"}, waves, wave_fields, {"n_frequency": "n_frequency_pattern"},
        reads="scaling wavelet_family use_idwt random_loc_seed proportional_parameters", kinds=BOTH,
    ),
    Form(
        "SUPERTUNING", SuperTuning,
        {"supertuning_indices": "index", "supertuning_values": "values", "supertuning_lora_A.weight": "A", "supertuning_lora_B.weight": "B"},
        supra, supra_fields, enter=supra_in, overall=sparsity,
        reads="sparsity select_top r lora_alpha lora_dropout save_precomputed_indices",
    ),
    Form(
        "POLY", Poly, {"poly_lora_A": "A", "poly_lora_B": "B", "poly_router.module_logits": "z"}, skills,
        lambda m: {"r": m.method.r, "n_skills": m.method.skills, "n_splits": m.method.splits, "n_tasks": 1}, enter=skills_in, leave=skills_out,
        reads="r n_tasks n_skills n_splits", fixed={"poly_type": "poly"},
    ),
    Form(
        "PVERA", PVeRA, {"pvera_lambda_d": "d", "pvera_lambda_b": "b"},
        lambda p: {
            "r": p.whole("r", 256), "start": p.number("d_initial", 0.1), "dropout": p.number("pvera_dropout", 0.0),
            "sample": p.source.flag("sample_at_inference"),
        },
        lambda m: {
            "r": m.method.r, "d_initial": m.method.start, "pvera_dropout": m.method.dropout, "sample_at_inference": m.method.sample, "save_projection": True
        },
        roots={"pvera_A": "A", "pvera_B": "B"},
        reads="r d_initial pvera_dropout sample_at_inference generator_seed save_projection projection_prng_key", kinds=BOTH,
    ),
)  # fmt: skip
