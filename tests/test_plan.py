"""Plans are values: the algebra's laws, strict reading and writing, and refusals that name the nearest."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import random
from typing import Any

import pytest
import yaml

import veneer as vn
from helpers import refuses
from veneer.plan import Gated, Stack, Sum, Term
from veneer.presets import _presets

A, B, C = vn.LoRA(4), vn.IA3(), vn.Bottleneck(8)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"r": 3, "alpha": 5.5, "dropout": 0.25, "init": "gaussian", "at": "linear,!ffn.*@{0,2}"}, {"alpha": 7}],
    "dora": [{}, {"r": 2, "init": "pissa", "ranks": {"attn.q": 3}, "alphas": {"ffn": 1.5}, "rank_stabilized": True, "b_rate": 4.0, "at": "linear"}],
    "loftq": [{}, {"r": 2, "quantiser": "int4", "freeze_a": True, "niter": 8}],
    "adalora": [{}, {"r": 4, "target": 2, "alpha": 3, "warmup": 0.0, "final": 0.25, "every": 5, "beta1": 0.5, "beta2": 0.9, "orthogonal": 0.0}],
    "vera": [{}, {"r": 4, "start": 0.2, "at": "ffn"}],
    "pvera": [{}, {"r": 4, "start": 0.2, "dropout": 0.1, "sample": True, "kl": 0.5}],
    "tied-lora": [{}, {"r": 4, "alpha": 2.5, "vectors": False}],
    "vblora": [{}, {"r": 2, "vectors": 9, "length": 4, "k": 3, "bound": 0.1, "std": 0.0}],
    "randlora": [{}, {"r": 4, "alpha": 2.5, "dropout": 0.1}],
    "lora-xs": [{}, {"r": 4, "alpha": 2.5, "at": "linear"}],
    "tinylora": [{}, {"r": 3, "u": 1, "share": "all"}],
    "moslora": [{}, {"r": 3, "alpha": 1, "mixer": "kaiming"}],
    "poly": [{}, {"r": 3, "skills": 2, "splits": 4, "alpha": 2.5, "shared": "a"}],
    "unilora": [{}, {"r": 3, "length": 9, "bound": 1.5}],
    "loretta": [{}, {"r": 3, "t": 2, "cores": 4, "alpha": 1}],
    "ia3": [{}, {"at": "attn.{q,k}", "on": "input"}, {"on": "output"}],
    "bitfit": [{}, {"at": "norm"}],
    "bottleneck": [{"size": 4}, {"reduction": 2.5, "parallel": True, "activation": "gelu", "scale": "learnt", "norm": True, "dropout": 0.1, "at": "attn,ffn"}],
    "prefix": [{}, {"length": 3, "reparameterize": 9, "init_std": 0.5, "positions": True, "at": "cross"}],
    "prompt": [
        {},
        {"length": 4, "init": "vocab", "before_cls": True, "fixed": True, "at": "embed"},
        {"length": None, "init": "text", "text": "Ein Täxt: 'quoted'\n"},
    ],
    "full": [{}, {"at": "norm"}, {"at": None, "tied": False}],
    "loha": [{}, {"r": 3, "alpha": 5.5, "at": "linear"}],
    "lokr": [{}, {"r": 3, "alpha": 5.5, "factor": 4, "decompose_both": True, "at": "linear"}],
    "fourierft": [{}, {"n": 9, "scale": 12.5, "seed": 3}],
    "waveft": [{}, {"n": 9, "scale": 12.5, "wavelet": None}, {"wavelet": "sym4", "seed": 3}],
    "c3a": [{}, {"block": 8}],
    "miss": [{}, {"r": 4, "mini": 8}],
    "road": [{}, {"variant": 4, "group": 8}],
    "oft": [{}, {"block": 4, "shared": True, "series": 5, "constrain": 1e-4}],
    "boft": [{}, {"block": 8, "factors": 2, "scale": False}],
    "hra": [{}, {"r": 2, "orthogonal": 0.1}],
    "gralora": [{}, {"r": 6, "k": 3, "alpha": 9.5}],
    "delora": [{}, {"r": 3, "bound": 2.5}],
    "hira": [{}, {"r": 3}],
    "psoft": [{}, {"r": 3, "before": False, "even": True, "series": 5, "constrain": 0.5, "niter": 2, "seed": 4}, {"orthogonal": False, "after": False}],
    "peanut": [{}, {"r": 3, "layers": 2, "activation": "gelu", "scale": 0.5}],
    "deft": [{}, {"r": 3, "projection": "qr", "alpha": 2.5}, {"inject": False}],
    "glora": [{}, {"r": 3, "ab": "vector", "c": "none", "de": "vector"}],
    "osf": [{}, {"keep": 4}, {"keep": 0.25}],
    "lily": [{}, {"r": 3, "experts": 4, "stride": 2, "scale": 0.5, "per": "batch"}],
    "adamss": [{}, {"r": 8, "subspaces": 3, "rank": 2, "threshold": 0.1, "seed": 4, "target": 9, "warmup": 0.0, "final": 0.25, "every": 5}],
    "frod": [{}, {"share": 0.25, "seed": 4, "ridge": 0.5}],
    "norm": [{}, {"at": "norm@0"}],
    "last-layers": [{}, {"n": 2, "head": False}],
    "magnitude": [{}, {"share": 0.25, "k": 9, "per": "matrix", "at": "attn.q", "smallest": True}],
    "random": [{}, {"r": 3, "seed": 4}],
    "super": [{}, {"share": 0.25, "r": 3, "alpha": 2.5, "dropout": 0.1, "smallest": True}],
    "gradient": [{}, {"criterion": "snip", "k": 9}],
    "fisher": [{}, {"k": 9}],
    "lottery": [{}, {"first": 0.25, "k": 9}],
    "tokens": [{"tokens": (3, 1)}, {"tokens": (7,), "at": "decoder/embed", "tied": False}],
    "beft": [{}, {"at": "attn.q"}],
    "compacter": [{}, {"n": 2, "size": 6, "rank": 2, "activation": "relu", "drop": 1, "skip": 2}, {"reduction": 3.5, "at": "ffn"}],
    "llama-adapter": [{}, {"length": 3, "per_head": False, "init_std": 0.5, "at": "attn"}],
    "loreft": [{}, {"rank": 2, "positions": "first:2+last:1", "at": "layer@1"}],
    "direft": [{}, {"rank": 2, "positions": "last:3", "orthogonal": True, "at": "ffn"}],
    "invertible": [{}, {"reduction": 3.5, "activation": "gelu", "at": "layer@1"}],
    "ladder": [{}, {"reduction": 4, "at": "layer@::2"}],
    "cartridge": [{}, {"length": 4, "sink": 2, "start": "data", "init_std": 0.5}, {"positions": False, "at": "attn@1"}],
    "cpt": [{"ids": (3, 4)}, {"ids": (3, 4, 5), "kinds": (1, 2, 4), "bound": 0.2, "format": 0.3, "context": 0.5, "decay": 0.9, "at": "embed"}],
    "p-tuning": [{}, {"length": 3, "encoder": "lstm", "hidden": 5, "layers": 1, "dropout": 0.1, "before_cls": True, "at": "embed"}],
    "multitask-prompt": [{}, {"length": 3, "rank": 2, "shared": "a", "source": "b,c", "before_cls": True, "at": "embed"}],
}
GATES = [{}, {"per": "token", "gate": "published", "bias": -2.5, "temperature": 0.5}, {"per": "constant", "rate": 5.0, "drop": 0.25}]


def methods() -> list[vn.Plan]:
    found = {m.name: m.cls for m in vn.methods()}
    return [found[name](**o) for name, options in OPTIONS.items() if name in found for o in options]


def some(dice: random.Random, depth: int = 3, gates: bool = True) -> vn.Plan:
    """A plan at random: of up to `depth` levels."""
    pick = dice.random()
    if depth == 0 or pick < 0.3:
        return dice.choice(methods())
    if pick < 0.6:
        return some(dice, depth - 1, gates) + some(dice, depth - 1, gates)
    if pick < 0.8 or not gates:
        return some(dice, depth - 1, gates) >> some(dice, depth - 1, gates)
    if pick < 0.9:
        return vn.paced(some(dice, depth - 1, gates), dice.choice((None, 0.25, 16.0)))
    return vn.gated(some(dice, depth - 1, False), **dice.choice(GATES))


PLANS = [*methods(), *(make() for make in _presets().values()), *(some(random.Random(i)) for i in range(60))]


# -- laws -------------------------------------------------------------------------------------------------------------
def test_every_method_is_here() -> None:
    assert {m.name for m in vn.methods()} == set(OPTIONS), "give the new method a line in OPTIONS"


@pytest.mark.parametrize("seed", range(20))
def test_laws(seed: int) -> None:
    dice = random.Random(seed)
    a, b, c = (some(dice, 2) for _ in range(3))
    for one, two in (((a + b) + c, a + (b + c)), ((a >> b) >> c, a >> (b >> c))):
        assert one == two and hash(one) == hash(two) and repr(one) == repr(two)
    for plan, kind in ((a + b + c, Sum), (a >> b >> c, Stack)):
        assert isinstance(plan, kind) and not any(isinstance(m, kind) for m in plan.members)
        assert list(plan.leaves()) == [*a.leaves(), *b.leaves(), *c.leaves()]
    assert (a >> b).depth() == a.depth() + b.depth()
    assert (a + b).depth() == max(a.depth(), b.depth())
    assert {a: 1}[vn.Plan.from_dict(a.to_dict())] == 1
    plain = some(dice, 2, gates=False)
    assert [(t.method, t.stage) for t in vn.gated(plain).terms()] == [(t.method, t.stage) for t in plain.terms()]
    assert all(t.gate is not None and t.gate.per == "token" for t in vn.gated(plain, per="token").terms())


def test_stages() -> None:
    assert [t.stage for t in (A + B >> C).terms()] == [0, 0, 1]
    assert [t.stage for t in (A >> B >> C).terms()] == [0, 1, 2]
    assert [t.stage for t in ((A >> B) + C).terms()] == [0, 1, 0]
    assert [t.stage for t in (((A >> B) + C) >> A).terms()] == [0, 1, 0, 2]
    assert next(iter(A.terms())) == Term(A, 0, None)
    assert A + B != B + A and A + B != A >> B and A != vn.LoRA(5) and A == vn.LoRA(4)


def test_plans_do_not_change() -> None:
    for plan in (A, A + B, A >> B, vn.gated(A)):
        for field in dataclasses.fields(plan):  # type: ignore[arg-type]
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(plan, field.name, 1)
        given = plan.to_dict()
        copy = json.dumps(given)
        made = vn.Plan.from_dict(given)
        assert json.dumps(given) == copy and made == plan
        given.clear()
        assert made == plan == pickle.loads(pickle.dumps(plan))


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: str(p)[:40])
def test_round_trips(plan: vn.Plan) -> None:
    for there, back in ((json.dumps, json.loads), (yaml.safe_dump, yaml.safe_load)):
        again = vn.Plan.from_dict(back(there(plan.to_dict())))
        assert again == plan and hash(again) == hash(plan)
        assert again.to_dict() == plan.to_dict()
    names = {n: getattr(vn, n) for n in vn.__all__}
    assert eval(str(plan), names) == plan  # printed as the Python that makes it


def test_str() -> None:
    assert str(vn.preset("unipelt-apl")) == "gated(Bottleneck(size=48) + Prefix() + LoRA(alpha=16))"
    assert str((A + B) >> C) == "(LoRA(r=4) + IA3()) >> Bottleneck(size=8)"
    assert str((A >> B) + C) == "(LoRA(r=4) >> IA3()) + Bottleneck(size=8)"
    assert repr(vn.gated(A, per="constant")) == "gated(LoRA(r=4), per='constant')"


# -- what from_dict takes ---------------------------------------------------------------------------------------------
def test_from_dict_takes() -> None:
    read = vn.Plan.from_dict
    assert read("unipelt-apl") == vn.preset("unipelt-apl")
    assert read(A) is A
    assert read([{"method": "lora", "r": 4}, "ia3"]) == A + B
    assert read([{"method": "lora", "r": 4}]) == A == read({"sum": [{"method": "lora", "r": 4}]})
    assert read({"stack": ["ia3", {"sum": ["ia3", "bitfit"]}]}) == B >> (B + vn.BitFit())
    assert read({"sum": [{"sum": ["ia3", "bitfit"]}, "ia3"]}) == B + vn.BitFit() + B
    assert read({"gated": ["ia3", "bitfit"], "per": "token"}) == vn.gated(B + vn.BitFit(), per="token")
    assert read({"gated": "lora", "bias": 1}) == vn.gated(vn.LoRA(8), bias=1.0)


BAD: list[tuple[Any, str, str]] = [
    ({"method": "lorra"}, "no method 'lorra'", "'lora'"),
    ({"method": "LoRA"}, "no method 'LoRA'", "lora"),
    ({"method": None}, "no method None", "lora"),
    ({"method": {}}, "no method", "lora"),
    ({"method": "lora", "rnk": 3}, "lora has no option 'rnk'", "Did you mean.*'r'"),
    ({"method": "lora", "dropuot": 3}, "no option 'dropuot'", "Did you mean 'dropout'"),
    ({"method": "lora", 3: 3}, "no option 3", "Known here"),
    ({"method": "lora", "r": 0}, "LoRA: r must be a whole number", "not 0"),
    ({"method": "lora", "r": True}, "whole number", "not True"),
    ({"method": "lora", "r": 8.0}, "whole number", "not 8.0"),
    ({"method": "lora", "r": None}, "whole number", "not None"),
    ({"method": "lora", "init": "kaimin"}, "init is 'kaimin'", "Did you mean 'kaiming'"),
    ({"method": "lora", "init": ["kaiming"]}, "init is", ""),
    ({"method": "lora", "at": ""}, "at must be a pattern", ""),
    ({"method": "lora", "at": ["attn.q"]}, "at must be a pattern", ""),
    ({"method": "lora", "dropout": 1.0}, "from 0 up to", "not 1.0"),
    ({"method": "lora", "alpha": float("inf")}, "finite number", "inf"),
    ({"method": "bottleneck"}, "either size or reduction", r"vn\.Bottleneck\(48\)"),
    ({"method": "bottleneck", "size": 4, "reduction": 4}, "either size or reduction", ""),
    ({"method": "bottleneck", "reduction": -1}, "reduction must be positive", "-1"),
    ({"method": "bottleneck", "size": 4, "parallel": "false"}, "parallel must be True or False", "'false'"),
    ({"method": "bottleneck", "size": 4, "norm": 1}, "norm must be True or False", "1"),
    ({"method": "bottleneck", "size": 4, "scale": "learned"}, "a number or 'learnt'", "'learned'"),
    ({"method": "bottleneck", "size": 4, "activation": "geluu"}, "activation is 'geluu'", "Did you mean 'gelu'"),
    ({"method": "prefix", "length": -1}, "length must be a whole number", "-1"),
    ({"method": "prefix", "init_std": -1.0}, "init_std must not be negative", "-1"),
    ({"method": "prompt", "init": "text"}, "go together", "Give both"),
    ({"method": "prompt", "text": 3, "init": "text"}, "text must be a string", "3"),
    ({"method": "prompt", "before_cls": "no"}, "before_cls must be True or False", ""),
    ({"method": "prompt", "length": None}, "only with init='text'", ""),
    ({"method": "lora", "sum": []}, "exactly one of", "mapping of its own"),
    ({"methd": "lora"}, "exactly one of", "Did you mean 'method'"),
    ({}, "exactly one of.*not nothing", ""),
    ([], "takes a list of plans, not", ""),
    ({"sum": []}, "takes a list of plans", ""),
    ({"sum": {"method": "lora"}}, "takes a list of plans", ""),
    ({"sum": ["lora"], "per": "token"}, "'sum' has no option 'per'", "stands alone"),
    ({"gated": "lora", "pre": "token"}, "'gated' has no option 'pre'", "Did you mean 'per'"),
    ({"gated": "lora", "per": "tokens"}, "per is 'tokens'", "Did you mean 'token'"),
    ({"gated": "lora", "per": []}, r"per is \[\]", "example"),
    ({"gated": "lora", "gate": "publish"}, "gate is 'publish'", "Did you mean 'published'"),
    ({"gated": "lora", "bias": "0"}, "bias must be a finite number", "'0'"),
    ({"gated": "lora", "temperature": 0}, "temperature must be positive", "0"),
    ({"gated": "lora", "rate": -1}, "rate must be positive", "-1"),
    ({"gated": "lora", "drop": 1}, "drop must be from 0", "1"),
    ({"paced": "lora", "by": 0}, "by is 0", "positive multiple"),
    ({"paced": "lora", "by": True}, "by is True", "positive multiple"),
    ({"gated": {"gated": "lora"}}, "gate within a gate", "Gate the whole plan once"),
    ("unipelt-alp", "no preset 'unipelt-alp'", "'unipelt-apl'"),
    (3, "a mapping, a list or a preset's name, not 3", ""),
    (None, "not None", ""),
    (10**5000, "without end", ""),
    ("x" * 10**6, "no preset 'xxx", ""),
]  # fmt: skip


@pytest.mark.parametrize(("data", "what", "fix"), BAD, ids=lambda v: str(v)[:30] if not isinstance(v, int) else "n")
def test_bad_plans(data: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        vn.Plan.from_dict(data)


def test_the_place_is_named() -> None:
    for bad in ({"method": "lora", "r": 0}, {"gated": "lora", "per": "x"}, {"method": "x"}, {"y": 1}, "nopreset", 3):
        with refuses(vn.PlanError, r"\[cfg\.yaml\.sum\[1\]\.stack\[0\]"):
            vn.Plan.from_dict(["lora", {"stack": [bad, "ia3"]}], where="cfg.yaml")


def test_nesting_has_an_end() -> None:
    for key in ("sum", "stack"):
        plan: Any = "lora"
        for _ in range(2000):
            plan = {key: [plan, "ia3"]}
        with refuses(vn.PlanError, "nested more than 32 deep"):
            vn.Plan.from_dict(plan)


def test_operators_take_plans() -> None:
    for other in (3, "lora", None, [A]):
        with refuses(vn.PlanError, r"\+ takes plans", "vn.LoRA"):
            A + other  # type: ignore[operator]
        with refuses(vn.PlanError, ">> takes plans"):
            A >> other  # type: ignore[operator]
        with refuses(vn.PlanError, "gated takes plans"):
            vn.gated(other)  # type: ignore[arg-type]


def test_presets() -> None:
    for name, make in _presets().items():
        assert vn.preset(name) == make() == vn.Plan.from_dict(name)
        assert name in (vn.preset.__doc__ or ""), f"{name} is not in the docstring"
    for a, b in itertools.combinations(_presets(), 2):
        assert vn.preset(a) != vn.preset(b)
    with refuses(vn.PlanError, "no preset 'mame'", "Did you mean 'mam'"):
        vn.preset("mame")
    with refuses(vn.PlanError, r"no preset \[\]"):
        vn.preset([])  # type: ignore[arg-type]
    assert isinstance(vn.preset("unipelt-ap"), Gated)


def test_what_has_no_deviation_takes_no_gate() -> None:
    class Whole(vn.Full):
        name, gateable = "whole", False

    with refuses(vn.PlanError, "whole replaces tensors", r"vn\.gated\(\.\.\.\) \+ vn\.Whole"):
        vn.gated(A + Whole())
