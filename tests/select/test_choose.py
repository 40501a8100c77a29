"""Dominance, front, hypervolume, PEFT-Bench's score, and the rule of the recommendation, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

import veneer as vn
from veneer.select.choose import front, hypervolume, lead, pscp, ranked, recommend
from veneer.select.report import Selection, Trial


def trial(number: int, score: float, parameters: float, **more: float) -> Trial:
    status = "complete" if math.isfinite(score) else "diverged"
    return Trial(number, {"method": "lora"}, 1e-3, status, {"score": score, "parameters": parameters, **more}, noise=0.01)


def test_front_keeps_what_nothing_dominates():
    trials = [trial(0, 0.8, 100), trial(1, 0.7, 10), trial(2, 0.7, 50), trial(3, 0.9, 1000), trial(4, 0.8, 100), trial(5, math.nan, 1)]
    assert [t.number for t in front(trials, ("score", "parameters"))] == [1, 0, 4, 3]
    assert [t.number for t in front(trials, ("score",))] == [3]


def test_latencies_that_differ_by_less_than_is_measurable_are_equal():
    slow, same = trial(0, 0.8, 100, latency=1.10), trial(1, 0.8, 90, latency=1.11)
    assert [t.number for t in front([slow, same], ("score", "parameters", "latency"))] == [1]
    far = trial(2, 0.8, 90, latency=1.3)
    assert [t.number for t in front([slow, far], ("score", "parameters", "latency"))] == [2, 0]


def test_hypervolume_is_the_dominated_area():
    assert hypervolume([(1.0, 1.0)], (0.0, 3.0)) == pytest.approx(2.0)
    assert hypervolume([(1.0, 1.0), (2.0, 2.0)], (0.0, 3.0)) == pytest.approx(1 + 2)
    assert hypervolume([(1.0, 1.0), (0.5, 2.0), (5.0, 4.0), (-1.0, 0.0)], (0.0, 3.0)) == pytest.approx(2.0)


def test_pscp_halves_at_each_scale():
    one = {"scales": (10.0, 2.0, 100.0), "weights": (1.0, 1.0, 1.0)}
    assert pscp(0.8, 0, 0, 0, **one) == pytest.approx(0.8)
    assert pscp(0.8, 10, 0, 0, **one) == pytest.approx(0.4)
    assert pscp(0.8, 10, 2, 100, **one) == pytest.approx(0.1)
    assert pscp(0.8, 30, 0, 0, scales=(10.0, 1.0, 1.0), weights=(0.5, 1, 1)) == pytest.approx(0.4)


def test_a_tie_within_noise_goes_to_the_cheapest():
    best, near, far = trial(0, 0.800, 1000), trial(1, 0.795, 100), trial(2, 0.70, 10)
    found, why = recommend([best, near, far])
    assert found is near and "within one standard error" in why
    # the same gap, but on the same examples it is always there: no tie
    best.replicates, near.replicates = [0.80, 0.81, 0.79], [0.795, 0.805, 0.785]
    assert lead(best, near) == (pytest.approx(0.005), pytest.approx(0.0))
    assert recommend([best, near, far])[0] is best


def test_ranking_drops_what_the_front_can_spare():
    points = [(0.9, 5.0), (0.5, 1.0), (0.51, 1.1), (0.4, 6.0)]
    assert ranked(points)[0] == 0 and ranked(points)[-1] == 3


def test_a_selection_survives_its_file(tmp_path):
    trials = [trial(0, 0.8, 100), trial(1, math.nan, 10)]
    found = Selection(trials, 0, "the best", {"params": "0.1%"}, {"parameters": 100.0}, ("score", "parameters"), {"seconds": 1.0}, {"seed": 0})
    again = Selection.load(found.save(tmp_path / "s"))
    assert again.recommended == vn.LoRA() and again.front == found.front[:1] and again.trials[1].status == "diverged"
    assert (tmp_path / "s" / "plan.yaml").read_text() == "plan:\n  method: lora\nlearning_rate: 0.001\n"
    assert "> " in str(again) and "diverged" in str(again)
    (tmp_path / "s" / "selection.json").write_text('{"format": "other"}')
    with pytest.raises(vn.StoreError, match="not a selection of ours"):
        Selection.load(tmp_path / "s")
