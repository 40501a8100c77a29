"""Spaces: what they hold, in which numbers, and what is refused."""

from __future__ import annotations

import itertools
import random

import pytest
from selection_toy import model

import veneer as vn
from helpers import build, refuses
from veneer.build import make_parts
from veneer.select.measure import count, merges
from veneer.select.space import Space


@pytest.fixture(scope="module")
def bert():
    return model()


def test_parts_combine_and_a_zero_leaves_out(bert):
    space = Space.parse({"parts": [{"method": "lora", "r": [0, 2, 4], "at": ["attn.q", "linear"]}, {"method": "ia3", "optional": True}]}, bert)
    found = [str(c.plan) for _, c in space]
    assert len(found) == space.size == (2 * 2 + 1) * 2 - 1 == len(set(found))
    assert "IA3()" in found and "LoRA(r=4, at='linear') + IA3()" in found and "LoRA(r=2, at='attn.q')" in found


def test_one_takes_exactly_one(bert):
    space = Space.parse({"parts": [{"method": "lora", "r": [0, 2, 4]}, "bitfit"], "together": "one", "rates": [1, 3]}, bert)
    found = [(str(c.plan), c.rate) for _, c in space]
    assert sorted(found) == [("BitFit()", 1e-3), ("BitFit()", 3e-3), ("LoRA(r=2)", 5e-4), ("LoRA(r=2)", 1.5e-3), ("LoRA(r=4)", 5e-4), ("LoRA(r=4)", 1.5e-3)]


def test_layers_on_or_off_for_all_parts_alike(bert):
    space = Space.parse({"parts": [{"method": "bottleneck", "size": [0, 2]}, {"method": "prefix", "length": 2}], "layers": "each"}, bert)
    assert space.size == 2 * (2**3 - 1)
    layers = set()
    for _, candidate in space:
        by_method = {}
        for part in make_parts(bert, candidate.plan, blank=True):
            by_method.setdefault(part.method_name, set()).add(part.site.layer)
        assert len({frozenset(v) for v in by_method.values()}) == 1  # one mask for all
        layers.add(frozenset(by_method["prefix"]))
    assert layers == {frozenset(c) for n in (1, 2, 3) for c in itertools.combinations(range(3), n)}


def test_slices_of_layers_leave_what_is_in_no_layer(bert):
    space = Space.parse({"parts": ["bitfit", {"method": "prompt", "length": 2}], "layers": [":", "2:"]}, bert)
    whole, top = [c.plan for _, c in space]
    assert {p.site.layer for p in make_parts(bert, whole, blank=True)} == {None, 0, 1, 2}
    assert {(p.method_name, p.site.layer) for p in make_parts(bert, top, blank=True)} == {("bitfit", 2), ("prompt", None)}


def test_gates_and_what_is_beside(bert):
    space = Space.parse({"parts": ["lora", "ia3"], "gated": [False, "token"]}, bert, beside=vn.Full(at="head"))
    assert [str(c.plan) for _, c in space] == ["LoRA() + IA3() + Full()", "gated(LoRA() + IA3(), per='token') + Full()"]
    with pytest.raises(vn.PlanError):  # two of them would replace the same tensors twice: it is not added again
        Space.parse([vn.Full(at="head") + vn.LoRA(99999)], bert, beside=vn.Full(at="head"))
    assert [str(c.plan) for _, c in Space.parse([vn.Full(at="head")], bert, beside=vn.Full(at="head"))] == ["Full()"]


def test_autopeft_is_the_papers_space():
    """Eleven sizes each for serial, parallel and prefix, and twelve layers on or off: 5.4 million on BERT-base."""
    import torch
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        base = BertModel(BertConfig())
    space = Space.parse("autopeft", base)
    assert [p.choices[k] for p, k in zip(space.parts, ("size", "size", "length"), strict=True)] == [[0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768]] * 3
    assert space.size == (11**3 - 1) * (2**12 - 1)
    rng = random.Random(0)
    found = space.draw(lambda name, options, ordered: rng.randrange(len(options)))
    assert found is not None and {m.name for m in found.plan.leaves()} <= {"bottleneck", "prefix"}


def test_cheapest_is_the_cheapest(bert):
    for data in ("default", "singles", {"parts": [{"method": "lora", "r": [2, 4]}, {"method": "prefix", "length": [0, 3]}], "layers": "each"}):
        space = Space.parse(data, bert)
        found, needs = space.cheapest(lambda p: count(bert, p))
        walked = itertools.islice(space, 60)
        assert needs == count(bert, found.plan) <= min(count(bert, c.plan) for _, c in walked)


def test_only_what_merges(bert):
    space = Space.parse("default", bert).merging()
    rng = random.Random(0)
    drawn = [space.draw(lambda name, options, ordered: rng.randrange(len(options))) for _ in range(40)]
    assert all(merges(c.plan) for c in drawn if c is not None) and {p.name for p in space.parts} == {"lora", "ia3", "bitfit"}
    with refuses(vn.ConfigError, "latency: \\+0% takes only what merges, and bottleneck does not", "lora"):
        Space.parse({"parts": [{"method": "bottleneck", "size": [1, 2]}]}, bert).merging()


def test_a_space_of_ours_takes_what_the_model_has():
    space = Space.parse("default", build("mpnet"))
    assert list(space.left_out) == ["prefix"] and "lora" in [p.name for p in space.parts]
    with refuses(vn.SiteError, "kv port"):
        Space.parse({"parts": ["prefix"]}, build("mpnet"))


def test_starts_are_in_the_space(bert):
    for name in ("default", "autopeft", "singles"):
        space = Space.parse(name, bert)
        plans = [space.draw(lambda n, o, b, s=s: s[n]).plan for s in space.starts()]
        assert len(plans) >= len(space.parts) and len({str(p) for p in plans}) == len(plans)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("autopft", "Did you mean 'autopeft'"),
        ([], "the space is empty"),
        ({"parts": []}, "the space is empty"),
        ({"parts": ["lora"], "plans": ["lora"]}, "either 'parts' or 'plans'"),
        ({"part": ["lora"]}, "Did you mean 'parts'"),
        ({"parts": [{"method": "lora", "rank": [1]}]}, "lora has no option 'rank'"),
        ({"parts": [{"method": "lora", "r": []}]}, "r has no choices"),
        ({"parts": [{"method": "lora", "r": [0]}]}, "always 0"),
        ({"parts": [{"method": "lora", "r": [0, -3]}]}, "r must be a whole number"),
        ({"parts": [{"method": "lara"}]}, "Did you mean 'lora'"),
        ({"parts": [{"r": 3}]}, "a mapping with 'method'"),
        ({"parts": ["lora"], "layers": "some"}, "is not one of all, each"),
        ({"parts": ["lora"], "gated": ["always"]}, "is not one of"),
        ({"parts": ["lora"], "rates": [0]}, "positive factors"),
        ({"parts": ["lora"], "together": "two"}, "Did you mean|is not one of"),
        ({"plans": ["lara"]}, "Did you mean 'lora'"),
        ({"plans": ["lora"], "layers": "each"}, "is for a space of parts"),
        (7, "a name, a list of plans or a mapping"),
    ],
)
def test_refusals(bert, data, says):
    with refuses(vn.VeneerError, says, model=bert):
        Space.parse(data, bert)
