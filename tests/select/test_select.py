"""vn.select from end to end on a small model: budgets, resuming, candidates that fail, and the model as it was."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from selection_toy import FAST, PLANS, SPACE, data, model, rows

import veneer as vn
from helpers import refuses, unchanged
from veneer.select.journal import LOG
from veneer.select.report import Selection
from veneer.select.run import plan_search

OUTCOME = {"status": "complete", "why": "", "loss": [], "noise": 0.0, "replicates": [], "steps": 1, "examples": 1, "train_seconds": 0.0, "seconds": 0.0}


def same(a: Selection, b: Selection) -> bool:
    """The same candidates, scores and choice; times are the machine's."""

    def known(s: Selection):
        return s.chosen, s.reason, [(t.number, t.plan, t.rate, t.status, t.objectives.get("score"), t.replicates, t.curves) for t in s.trials]

    return known(a) == known(b)


def test_select_finds_what_learns_and_leaves_the_model_as_it_was():
    base, random_before = model(), (random.getstate(), torch.get_rng_state())
    with unchanged(base):
        found = vn.select(base, data(), space=SPACE, budget={"trials": 4}, halving=False, **FAST)
    assert random.getstate() == random_before[0] and torch.equal(torch.get_rng_state(), random_before[1])
    assert [t.status for t in found.trials] == ["complete"] * 4
    assert found.best.score > 0.8 and found.recommended == vn.Plan.from_dict(found.best.plan)
    for t in found.trials:
        assert set(t.objectives) == {"score", "parameters", "latency", "memory", "seconds"}
        assert t.objectives["latency"] == 1.0 if t.merges else 0 < t.objectives["latency"] != 1.0  # measured, on a machine that may be busy
        assert 0 < t.pscp <= t.score and t.cost["steps"] == 60 and len(t.curves["full"]["loss"]) > 10
        assert t.objectives["parameters"] == vn.attach(base, t.plan).num_parameters
        vn.detach(base)
    assert found.best in found.front and "Full()" in str(found) and "recommended: trial" in str(found)
    assert vn.Plan.from_dict(json.loads(json.dumps(found.to_dict()))["trials"][0]["plan"]) == vn.LoRA(2) + vn.Full(at="head")
    adapter = vn.attach(base, found.recommended)
    assert adapter.num_parameters == found.best.objectives["parameters"]


def test_halving_spends_less_and_drops_the_worse():
    found = vn.select(model(), data(), space="singles", budget={"trials": 9}, steps=180, batch_size=4, executor="race")
    status = [t.status for t in found.trials]
    assert status.count("complete") >= 1 and status.count("dropped") >= 4
    assert found.cost["steps"] == 9 * 60 + 3 * 180
    done = next(t for t in found.trials if t.status == "complete")
    assert list(done.curves) == ["1/3", "full"] and done.cost["steps"] == 60 + 180
    assert all("latency" not in t.objectives and "others were better" in t.why for t in found.trials if t.status == "dropped")


def test_a_killed_search_goes_on_to_the_same_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("veneer.select.search"), "LEAST_STEPS", 10)  # rungs in a short training
    arguments = {"space": "default", "budget": {"trials": 5, "params": "40%"}, "seed": 3, "steps": 30, "batch_size": 4}
    whole = vn.select(model(), data(), folder=tmp_path / "whole", **arguments)

    class Killed(BaseException):
        pass

    def kill_after(n):
        count = iter(range(n))

        def tell(progress):
            if progress.event == "rung" and next(count, None) is None:
                raise Killed

        return tell

    for n in (0, 2):
        base = model()
        with unchanged(base), pytest.raises(Killed):
            vn.select(base, data(), folder=tmp_path / "cut", tell=kill_after(n), **arguments)
        with (tmp_path / "cut" / LOG).open("ab") as f:  # what a kill in the middle of a write leaves
            f.write(b'{"op_code": 8, "tri')
    again = vn.select(model(), data(), folder=tmp_path / "cut", **arguments)
    assert same(whole, again) and len(again.trials) == 5
    assert same(Selection.load(tmp_path / "cut"), again)  # and what is finished is shown again
    more = vn.select(model(), data(), folder=tmp_path / "cut", **arguments | {"budget": {"trials": 6, "params": "40%"}})
    assert len(more.trials) == 6 and [t.plan for t in more.trials[:5]] == [t.plan for t in again.trials]
    with refuses(vn.ConfigError, "a search with other settings \\(seed\\)"):
        vn.select(model(), data(), folder=tmp_path / "cut", **arguments | {"seed": 4})


def test_a_candidate_that_diverges_is_dropped_and_reported():
    alone = vn.select(model(), data(), space={"plans": ["lora"]}, **FAST)
    found = vn.select(model(), data(), space={"plans": ["lora"], "rates": [1, 1e20]}, **FAST)
    good, bad = found.trials
    assert bad.status == "diverged" and "no finite number" in bad.why and math.isnan(bad.score)
    assert good.score == alone.trials[0].score and found.chosen == 0 and bad not in found.front
    assert "diverged" in str(found)


def test_a_candidate_that_fails_is_reported_and_the_others_unharmed():
    def broken(logits, labels):
        return float("nan") if logits.std() > 1e6 else float((logits.argmax(-1) == labels).mean())

    def worker(worker, jobs):
        for i, job in enumerate(jobs):
            if job.plan["sum"][0]["method"] == "ia3":
                worker_data, worker.data.collate = worker.data.collate, lambda examples: {"input_ids": torch.zeros(1, 99, dtype=torch.long)}
                yield i, worker(job)
                worker.data.collate = worker_data
            else:
                yield i, worker(job)

    base = model()
    with unchanged(base):
        found = vn.select(base, data(), space=PLANS[:2], metric=broken, executor=worker, **FAST)
    assert [t.status for t in found.trials] == ["complete", "failed"] and "Error" in found.trials[1].why
    with refuses(vn.ConfigError, "none of 1 candidates could be trained", "Error"):
        vn.select(base, data(), space=PLANS[1:2], executor=worker, **FAST)


def test_over_the_budget_is_never_trained():
    base = model()
    found = vn.select(base, data(), space="default", budget={"trials": 3, "params": 800, "latency": "+0%"}, **FAST)
    assert all(t.objectives["parameters"] <= 800 and t.merges for t in found.trials)
    seen = []
    with refuses(vn.ConfigError, r"no candidate fits params: 0.1% \(7 of the base's 7,874\)", "The cheapest, .*, needs", model=base):
        vn.select(base, data(), space="default", budget={"params": "0.1%"}, tell=seen.append, **FAST)
    with refuses(vn.ConfigError, "none of .* candidates fits the budget \\(memory: 1KB\\)", "The nearest, .* GB of memory", model=base):
        vn.select(base, data(), space=PLANS, budget={"memory": "1KB"}, tell=seen.append, **FAST)
    assert not seen


def test_a_race_finds_what_learns_too():
    alone, raced = (vn.select(model(), data(), space=SPACE, halving=False, executor=e, **FAST) for e in ("local", "race"))
    base = model()
    torch.rand(5)  # whatever was drawn before
    assert same(raced, vn.select(base, data(), space=SPACE, halving=False, executor="race", **FAST))
    assert [t.status for t in raced.trials] == ["complete"] * 4 and raced.best.score > 0.8
    for a, b in zip(alone.trials, raced.trials, strict=True):
        assert abs(a.score - b.score) < 0.15 and b.cost["steps"] == 60 and "latency" in b.objectives


def test_a_race_of_recorded_steps_and_more_finalists():
    """graph=True is the same race (on a CPU its steps run as they are); with 5 finalists five of nine go the whole way."""
    plain, recorded = (vn.select(model(), data(), space=SPACE, halving=False, executor="race", graph=g, **FAST) for g in (False, True))
    for a, b in zip(plain.trials, recorded.trials, strict=True):
        assert b.status == "complete" and abs(a.score - b.score) < 0.03
        losses = [[loss for _, loss in t.curves["full"]["loss"]] for t in (a, b)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    long = {"steps": 180, "batch_size": 2, "executor": "race", "budget": {"trials": 9}}
    found = vn.select(model(), data(), space="singles", finalists=5, **long)
    assert [t.status for t in found.trials].count("complete") == 5 and found.cost["steps"] == 9 * 60 + 5 * 180
    assert found.settings["finalists"] == 5


def test_the_empty_plan_is_not_asked_for_again_and_again():
    """Where fewer parameters are always better the sampler tends to the empty plan; it learns that there is nothing."""
    base = model()

    def scored(worker, jobs):
        for i in range(len(jobs)):
            yield i, OUTCOME | {"score": 0.5 + 0.001 * (i % 3)}

    search = plan_search(base, data(), space="autopeft", budget={"trials": 30}, executor=scored, seed=1, **FAST)
    search.run()
    kinds = [t.user_attrs["kind"] for t in search.record.all()]
    assert kinds.count("accepted") == 30 and kinds.count("empty") <= 15, kinds


def test_what_is_no_better_than_nothing_is_worth_no_parameters():
    """Of two scores at the commonest class the cheaper is not better; where none is dropped early each question uses all answers."""
    base = model()
    uneven = rows(60)[:20] + [r for r in rows(200, seed=2) if int(r["labels"]) == 1][:30]
    share = sum(int(r["labels"]) for r in uneven) / 50
    search = plan_search(base, (rows(96), uneven), space="singles", budget={"trials": 3}, executor="local", **FAST)
    assert search.generation == 1 and plan_search(base, data(), space="singles", executor="race", **FAST).generation == 9
    assert plan_search(base, data(), space="singles", **FAST | {"steps": 180}).generation == 9
    seen = []
    search.executor = lambda worker, jobs: seen.append(len(jobs)) or ((i, OUTCOME | {"score": share}) for i in range(len(jobs)))
    search.run()
    assert search.floor == pytest.approx(share) and seen == [1, 1, 1]
    assert search.worth(share, 10) == search.worth(share, 20) == (share, math.log10(search.base))
    assert search.worth(share + 0.01, 10) == (share + 0.01, 1.0)
    assert {t.values[1] for t in search.record.all()} == {math.log10(search.base)}
    f1 = search.worker.data
    f1.metric = "macro_f1"
    assert f1.floor(base, 8) == pytest.approx(max(2 * p / (1 + p) for p in (share, 1 - share)) / 2)
    f1.metric = "loss"
    assert f1.floor(base, 8) == pytest.approx(f1.score(base, list(range(50)), 8)[0])
    f1.metric = lambda logits, labels: 0.0
    assert f1.floor(base, 8) == -math.inf


def test_minutes_are_kept(monkeypatch):
    """By a clock on which each look takes a second, so that the end comes in the first training however fast the machine is."""
    clock = SimpleNamespace(time=itertools.count().__next__, perf_counter=time.perf_counter)
    for module in ("search", "fit"):
        monkeypatch.setattr(importlib.import_module(f"veneer.select.{module}"), "time", clock)
    found = vn.select(model(), data(), space=PLANS, budget={"minutes": 1}, steps=100000, batch_size=4)
    assert clock.time() < 70 and 0 < found.trials[0].cost["steps"] < 60 and {t.status for t in found.trials} == {"unfinished"}
    assert "the time was up at step" in found.trials[0].why and "before it began" in found.trials[1].why and "none was trained in full" in found.reason


def test_grid_takes_every_candidate_once_and_random_is_random():
    space = {"parts": [{"method": "lora", "r": [1, 2]}, {"method": "ia3", "optional": True}]}
    grid = vn.select(model(), data(), space=space, sampler="grid", steps=5, batch_size=4)
    assert len({json.dumps(t.plan) for t in grid.trials}) == len(grid.trials) == 4
    chance = [vn.select(model(), data(), space="default", sampler="random", budget={"trials": 3}, seed=s, steps=2, batch_size=4) for s in (0, 0, 1)]
    assert same(chance[0], chance[1]) and not same(chance[0], chance[2])


def test_other_metrics_and_a_language_model():
    from helpers import build

    lm = build("llama")
    g = torch.Generator().manual_seed(0)
    texts = [{"input_ids": (x := torch.randint(0, 20, (8,), generator=g)), "labels": x} for _ in range(30)]
    found = vn.select(lm, texts, space=["lora", "ia3"], steps=4, batch_size=4)
    assert found.settings["metric"] == "loss" and all(t.score < 0 for t in found.trials) and found.pscp == {}
    assert [str(m) for m in found.recommended.leaves()] in (["LoRA()"], ["IA3()"])
    f1 = vn.select(model(), {"train": rows(60), "eval": rows(40, 5)}, space=["lora"], metric="macro_f1", examples=40, steps=5)
    assert f1.settings["train_examples"] == 40 and 0 <= f1.best.score <= 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data": [r | {"labels": torch.tensor(1)} for r in rows(20)]}, vn.DataError, "one label, 1"),
        ({"examples": 97}, vn.DataError, "97 training examples are wanted and there are 96"),
        ({"data": ([], rows(3))}, vn.DataError, "there are no training examples"),
        ({"data": (rows(20), [])}, vn.DataError, "there are no evaluation examples"),
        ({"data": (rows(20), rows(20, classes=3))}, vn.DataError, "labels that training never sees: 2"),
        ({"data": (rows(20, classes=5), rows(20))}, vn.DataError, "the model has 2 classes"),
        ({"data": [{"input_ids": [1, 2]}] * 3}, vn.DataError, "no 'labels' but input_ids"),
        ({"data": 3}, vn.DataError, "Give a list of examples"),
        ({"data": {"eval": rows(3)}}, vn.DataError, "no 'train'"),
        ({"space": []}, vn.ConfigError, "the space is empty"),
        ({"metric": "acuracy"}, vn.ConfigError, "Did you mean 'accuracy'"),
        ({"objectives": ["parameters"]}, vn.ConfigError, "lack 'score'"),
        ({"objectives": ["score", "size"]}, vn.ConfigError, "no objective 'size'"),
        ({"sampler": "tpf"}, vn.ConfigError, "Did you mean 'tpe'"),
        ({"executor": "rey"}, vn.ConfigError, "Did you mean 'ray'"),
        ({"graph": True}, vn.ConfigError, "graph records the steps of a race.*executor='race'"),
        ({"graph": 1, "executor": "race"}, vn.ConfigError, "graph is 1"),
        ({"finalists": 0}, vn.ConfigError, "finalists is 0.*from 1 to 9"),
        ({"finalists": 10}, vn.ConfigError, "finalists is 10"),
        ({"steps": 0}, vn.ConfigError, "steps must be a whole number"),
        ({"epochs": -1}, vn.ConfigError, "epochs must be a positive number"),
        ({"budget": {"parms": 3}}, vn.ConfigError, "Did you mean 'params'"),
        ({"beside": "hed"}, vn.PlanError, "Did you mean 'head'"),
    ],
)
def test_bad_input(change, error, says):
    base = model()
    arguments = {"data": data(), "space": PLANS} | FAST | change
    with refuses(error, says, model=base):
        vn.select(base, **arguments)


def test_a_model_with_adapters_is_refused():
    base = model()
    vn.attach(base, "lora")
    with refuses(vn.AdapterError, "vn.detach\\(model\\) first"):
        vn.select(base, data(), space=PLANS)
