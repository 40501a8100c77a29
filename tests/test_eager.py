"""Routed calls that nothing follows: two products a map, and little Python between them."""

import sys

import pytest
import torch

import veneer as vn
from test_common import NAMES, alike
from test_many_adapters import batch, real
from veneer.eager import Eager
from veneer.ops import routed
from veneer.slots import Slots

OUTS = (6, 4, 5)


def make(outs=OUTS, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, a, b, *ys = (torch.randn(s, generator=g).to(dtype) for s in ((4, 3, 7), (4, 2 * len(outs), 7), (4, sum(outs), 2), *((4, 3, o) for o in outs)))
    return Eager(a, list(b.split(outs, 1)), 2, 4), x, list(a.split(2, 1)), list(b.split(outs, 1)), ys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outs", [(6,), OUTS])
def test_equals_the_reference(outs, dtype):
    e, x, downs, ups, ys = make(outs, dtype)
    for i, (a, b, y) in enumerate(zip(downs, ups, ys, strict=True)):
        want = routed.reference(x.float(), y.float(), a.float(), b.float(), range(4))
        assert e.takes(x, y) and e.add(i, x, y) is y
        assert (y.float() - want).norm() / want.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    assert e.x is None and not any(z is not None for z in e.zs)  # nothing is kept


def test_what_was_made_for_one_input_is_not_given_for_another():
    e, x, downs, ups, ys = make()
    e.add(0, x, ys[0].clone())
    x.mul_(2)
    for z in (x, x + 1, x):
        for i in (1, 2, 0, 0):
            want = routed.reference(z, ys[i], downs[i], ups[i], range(4))
            torch.testing.assert_close(e.add(i, z, ys[i].clone()), want)
    assert e.apart


def test_other_sizes_kinds_and_layouts_are_not_taken():
    e, x, _, _, ys = make()
    y = ys[0]
    assert e.takes(x, y)
    assert not e.takes(x.double(), y) and not e.takes(x, y.double()) and not e.takes(x[:3], y[:3]) and not e.takes(x[:0], y[:0])
    assert not e.takes(x, y.transpose(0, 1)) and not e.takes(x.to("meta"), y)


def test_a_models_call_goes_this_way_and_is_the_same(monkeypatch):
    model, inputs = alike().eval(), batch()
    with torch.no_grad(), vn.route(model, NAMES):
        with monkeypatch.context() as m:
            m.setattr(Slots, "quick", lambda *a: None)
            want = model(**inputs).logits
        with monkeypatch.context() as m:
            m.setattr(Slots, "call", lambda *a: 1 / 0)
            got = model(**inputs).logits
            with torch.inference_mode():
                inferred = model(**inputs).logits
            model.generate(**{**inputs, "use_cache": True}, max_new_tokens=2, pad_token_id=0)
    torch.testing.assert_close(real(got, inputs), real(want, inputs))
    torch.testing.assert_close(inferred, got)


def test_little_python_for_a_map():
    model, inputs = alike().eval(), batch()
    counts = []

    def count(f):
        seen = 0

        def each(frame, event, arg):
            nonlocal seen
            seen += event in ("call", "c_call")

        f()
        sys.setprofile(each)
        try:
            f()
        finally:
            sys.setprofile(None)
        counts.append(seen)

    with torch.no_grad():
        with vn.route(model, NAMES):
            count(lambda: model(**inputs))
        with vn.disabled(model):
            count(lambda: model(**inputs))
    maps = 14
    assert (counts[0] - counts[1]) / maps < 45
