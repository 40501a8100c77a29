"""The types whose files leave out what follows from the base: its singular vectors, bases and clusters are made again."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..errors import CapabilityError
from ..methods import OSF, PSOFT, AdaMSS, FRoD
from ..methods.bases import basis, kind, left
from ..methods.matrices import svd, wide
from ..methods.osf import triplets
from ..methods.subspaces import segmented, with_bias
from ..ops.maps import map_of
from ..ops.weights import weight_of
from .forms import BOTH
from .layouts import series, series_out
from .table import NATIVE, Form, Made, Place, Tensors


def base(at: Any) -> Tensor:
    """W of the base at a place that is read or written, in fp32."""
    return wide(weight_of(at.module, at.site, map_of(at.site, at.module)))


def unlike(m: Made, what: str) -> CapabilityError:
    return CapabilityError(f"PEFT's files make {what} of {m.site.path!r} again from the base, and this adapter's are others", fix=NATIVE)


# -- PSOFT: R alone; alpha / r divides B and multiplies the result ---------------------------------------------------------
def psoft(p: Place) -> dict[str, Any]:
    s = p.source
    orthogonal = s.flag("psoft_orth", True)
    terms = series(s) if orthogonal and s.flag("use_cayley_neumann") else None
    return {
        "r": p.whole("r", 32), "orthogonal": orthogonal, "before": s.flag("psoft_mag_a", True), "after": s.flag("psoft_mag_b", True),
        "even": p.one_of("ab_svd_init", "psoft_init", {"psoft_init": False, "pissa_init": True}), "series": terms,
        "constrain": None if terms is None or s.config.get("cayley_neumann_eps") is None else s.number("cayley_neumann_eps", 0.9),
        "niter": p.one_of("psoft_svd", "full", {"full": None, "lowrank": s.whole("psoft_svd_lowrank_niter", 10)}),
        "seed": s.count("random_seed", 0), "dropout": s.number("psoft_dropout", 0.0),
    }  # fmt: skip


def principal(w: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    u, s, v = svd(w, options["r"], options["niter"], options["seed"])
    return (v * s.sqrt().unsqueeze(-1), u * s.sqrt()) if options["even"] else (v, u * s)


def psoft_in(p: Place) -> Tensors:
    options = psoft(p)
    out = {k: v for k, v in p.tensors.items() if k != "R"}
    r = p.tensors["R"]
    out |= {"Q": r} if options["orthogonal"] else {"D": r - torch.eye(options["r"])}
    out["A"], out["B"] = principal(base(p), options)
    return out


def psoft_out(m: Made) -> Tensors:
    t, o = m.tensors, m.method
    a, b = principal(base(m), {"r": o.r, "niter": o.niter, "seed": o.seed, "even": o.even})
    signs = torch.where((a * t["A"]).sum(-1) < 0, -1.0, 1.0)  # of singular vectors, which are free
    for now, then in ((a * signs[:, None], t["A"]), (b * signs, t["B"])):
        if not torch.allclose(now, then, atol=1e-5 * float(then.abs().max()), rtol=0):
            raise unlike(m, "the singular vectors")
    if o.orthogonal:
        rows, cols = torch.triu_indices(o.r, o.r, 1)
        r = t["Q"] * signs[rows] * signs[cols]
    else:
        r = (t["D"] + torch.eye(o.r)) * signs[:, None] * signs
    return {"R": r, **{k: v for k, v in t.items() if k in ("before", "after")}}


def psoft_fields(m: Made) -> dict[str, Any]:
    o = m.method
    return {
        "r": o.r, "psoft_alpha": o.r, "psoft_dropout": o.dropout, "ab_svd_init": "pissa_init" if o.even else "psoft_init",
        "psoft_svd": "full" if o.niter is None else "lowrank", "psoft_svd_lowrank_niter": o.niter or 10, "random_seed": o.seed, "psoft_orth": o.orthogonal,
        "psoft_mag_a": o.before, "psoft_mag_b": o.after, "use_cayley_neumann": o.series is not None, "num_cayley_neumann_terms": series_out(o.series),
        "cayley_neumann_eps": o.constrain,
    }  # fmt: skip


# -- OSF: the trained triplets alone --------------------------------------------------------------------------------------
def osf_in(p: Place) -> Tensors:
    w = base(p)
    return {**p.tensors, **{k: v for k, v in triplets(*svd(w, min(w.shape), None), p.tensors["S"].numel()).items() if v is not None}}


def osf_out(m: Made) -> Tensors:
    w, t = base(m), m.tensors
    u, s, v = svd(w, min(w.shape), None)
    n = len(s) - len(t["S0"])
    then, now = (t["U0"] * t["S0"]) @ t["V0"], (u[:, n:] * s[n:]) @ v[n:]
    if not torch.allclose(then, now, atol=1e-5 * float(now.abs().max()), rtol=0):
        raise unlike(m, "the minor singular directions")
    return t


def osf_ranks(made: list[Made]) -> dict[str, Any]:
    """PEFT looks for a pattern anywhere in a path."""
    kept = {m.site.path: min(m.site.out, m.site.inp) - len(m.tensors["S"]) for m in made}
    first = next(iter(kept.values()))
    return {"effective_rank": first, "rank_pattern": {f"^{re.escape(path)}$": n for path, n in kept.items() if n != first}}


# -- AdaMSS: which rows are whose follows from the base --------------------------------------------------------------------
def adamss(p: Place) -> dict[str, Any]:
    return {
        "r": p.whole("r", 100), "subspaces": p.whole("num_subspaces", 5), "rank": p.whole("subspace_rank", 1), "seed": p.source.count("random_seed", 0),
        "threshold": p.number("svd_threshold", 0.1) if p.source.flag("use_dynamic_rank") else None,
    }  # fmt: skip


def clusters(at: Any, r: int, k: int, seed: int) -> list[Tensor]:
    bias = at.module._parameters.get("bias")
    return segmented(with_bias(base(at), None if bias is None else bias.detach()), r, k, seed)[2]


def adamss_in(p: Place) -> Tensors:
    o = adamss(p)
    found = clusters(p, o["r"], o["subspaces"], o["seed"])
    for i, rows in enumerate(found):
        if len(p.tensors[f"B.{i}"]) != len(rows):
            raise p.source.fail(f"the rows of {p.path!r} fall into other subspaces here than in the file", "The adapter is for another base")
    live = torch.ones(len(found), dtype=torch.bool)
    return {**p.tensors, "V": p.tensors["V"], "rows": torch.cat(found).argsort().int(), "live": live}


def adamss_out(m: Made) -> Tensors:
    o = m.method
    if not torch.equal(torch.cat(clusters(m, o.r, o.subspaces, o.seed)).argsort().cpu(), m.tensors["rows"].long().cpu()):
        raise unlike(m, "the subspaces")
    return m.tensors


def adamss_fields(m: Made) -> dict[str, Any]:
    o = m.method
    return {
        "r": o.r, "num_subspaces": o.subspaces, "subspace_rank": o.rank, "random_seed": o.seed, "init_weights": "orthogonal",
        "use_dynamic_rank": o.threshold is not None, "svd_threshold": 0.1 if o.threshold is None else o.threshold,
    }  # fmt: skip


# -- FRoD: U is made of the base and V, and λ is whole --------------------------------------------------------------------
def category(i: int, order: list[str], _: Any = None) -> str:
    """What PEFT calls the modules that share a basis: the end of their paths."""
    *above, last = order[i].split(".")
    if not above or above[-1].isdigit():
        return last
    return "attention_output" if [*above[-2:], last] == ["attention", "output", "dense"] else f"{above[-1]}_{last}"


def block(path: str, among: int) -> int:
    """PEFT's number of a layer: the number after 'layers', or the first."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(p) for p in (*[a for a in after if a.isdigit()], *parts) if p.isdigit()), among)


def frod_in(p: Place) -> Tensors:
    t, n = p.tensors, p.site.inp
    v, (rows, cols) = t["V"], t["index"].long()
    if t["size"].tolist() != [n, n] or bool((t["index"] < 0).any()) or bool((t["index"] >= n).any()):
        raise ValueError("places outside of the matrix")
    w = base(p)
    u, length = left(w, v)
    if not torch.allclose((u * length) @ v.T, w, atol=1e-4 * float(w.abs().max()), rtol=0):
        raise p.source.fail(f"the basis in the file does not give {p.path!r} back, so that PEFT's adapter begins elsewhere than the base", "Merge it with PEFT")
    p.roots[f"V_{kind(p.site)}"], p.roots[f"index_{kind(p.site)}"] = v, (rows * n + cols).int()
    return {"d": t["lambda"] - length, "S": t["values"]}


def frod_gather(made: list[Made]) -> None:
    """PEFT makes V of the base again, and U with it, before it reads V: so it must be ours, but for signs."""
    order = [path for path, _ in made[0].model.named_modules() if path in {m.site.path for m in made}]
    kinds: dict[str, dict[int, Made]] = {}
    for i, path in enumerate(order):  # a later module of the same kind and layer takes an earlier one's place there
        kinds.setdefault(category(i, order), {})[block(path, i)] = next(m for m in made if m.site.path == path)
    bases = {name: basis([base(m) for _, m in sorted(layers.items())], made[0].method.ridge) for name, layers in kinds.items()}
    for m in made:
        v, mine, n = bases[category(0, [m.site.path])], m.part.shared("V").detach().cpu(), m.site.inp
        signs = torch.where((v * mine).sum(0) < 0, -1.0, 1.0) if v.shape == mine.shape else None
        if signs is None or not torch.allclose(v * signs, mine, atol=1e-5 * float(mine.abs().max()), rtol=0):
            raise unlike(m, "the shared basis")
        index = m.part.shared("index").long().cpu()
        places = torch.stack([index // n, index % n])
        length = left(base(m), v)[1].cpu()
        m.tensors.update(V=v, index=places, size=torch.tensor([n, n]), values=m.tensors["S"].cpu() * signs[places[0]] * signs[places[1]])
        m.tensors["lambda"] = m.tensors["d"].cpu() + length


FORMS = (
    Form(
        "FROD", FRoD, {"frod_lambda_l": "lambda", "frod_lambda_s_values": "values"},
        lambda p: {"share": p.number("sparse_rate", 0.01), "seed": p.source.count("projection_prng_key", 0), "ridge": p.number("regularization_alpha", 1e-3)},
        lambda m: {"sparse_rate": m.method.share, "projection_prng_key": m.method.seed, "regularization_alpha": m.method.ridge, "save_projection": True},
        numbered={"frod_V": "V", "frod_s_indices": "index", "frod_s_size": "size"}, group=category, enter=frod_in, gather=frod_gather, reads_base=True,
        reads="sparse_rate projection_prng_key regularization_alpha save_projection frod_dropout progressbar runtime_offload_base_weight", kinds=BOTH,
    ),
    Form(
        "ADAMSS", AdaMSS, {"adamss_newB": "V", **{f"adamss_{k}.{i}": f"{k}.{i}" for k in "AB" for i in range(256)}}, adamss, adamss_fields,
        enter=adamss_in, leave=adamss_out, reads_base=True,
        reads="r num_subspaces subspace_rank random_seed use_dynamic_rank svd_threshold use_asa asa_target_subspaces init_warmup final_warmup mask_interval"
        " asa_importance_beta asa_uncertainty_beta asa_schedule_exponent",
    ),
    Form(
        "OSF", OSF, {f"osf_svd_params.{k}_low": k for k in "USV"}, lambda p: {"keep": min(p.site.out, p.site.inp) - p.tensors["S"].numel()}, lambda m: {},
        enter=osf_in, leave=osf_out, overall=osf_ranks, reads="effective_rank rank_pattern target_svd_config", reads_base=True,
    ),
    Form(
        "PSOFT", PSOFT, {"psoft_R.weight": "R", "psoft_R.vector_a": "before", "psoft_R.vector_b": "after"}, psoft, psoft_fields,
        enter=psoft_in, leave=psoft_out, reads_base=True,
        reads="r psoft_alpha psoft_dropout ab_svd_init psoft_svd psoft_svd_lowrank_niter random_seed psoft_orth psoft_mag_a psoft_mag_b"
        " use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps",
    ),
)  # fmt: skip
