"""The race: candidates that train together are what each is alone; losers, divergence, kills and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer as vn
from helpers import build, refuses, unchanged
from veneer.select.lanes import Candidate
from veneer.select.race import RaceReport, race

HEAD = vn.Full(at="head")
PLANS: dict[str, Any] = {
    "lora": vn.LoRA(2) + HEAD,
    "ia3": vn.IA3() + HEAD,
    "bottleneck": Candidate(vn.Bottleneck(4) + HEAD, lr=3e-3, schedule="cosine", weight_decay=0.1),
    "prefix": vn.Prefix(3) + HEAD,
    "bitfit": Candidate(vn.BitFit() + HEAD, lr=2e-3, clip=None),
    "prompt": vn.PromptTuning(2) + HEAD,
    "unipelt": Candidate(vn.gated(vn.Bottleneck(4) + vn.Prefix(3) + vn.LoRA(2)) + HEAD, lr=2e-3, warmup=0.0, schedule="constant", clip=0.3),
    "head": HEAD,
    "gated": vn.gated(vn.BitFit() + vn.IA3() + vn.PromptTuning(2)) + HEAD,
    "full": Candidate(vn.Full(at="all"), lr=1e-3),
}


def examples(n: int, seed: int, classes: int = 3) -> list[dict[str, Any]]:
    """Sequences of many lengths whose label is the residue of their first token."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        ids = [rng.randrange(5, 40) for _ in range(rng.randrange(2, 9))]
        out.append({"input_ids": ids, "labels": ids[0] % classes})
    return out


TRAIN, DEV = examples(30, 1), examples(20, 2)


def ready() -> Any:
    return build("bert").eval()


def run(plans: dict[str, Any], model: Any = None, **options: Any) -> tuple[RaceReport, dict[str, dict[str, torch.Tensor]]]:
    model = ready() if model is None else model
    options = {"steps": 20, "batch": 4, "keep": "all", "seed": 3} | options
    report = race(model, plans, TRAIN, DEV, **options)
    return report, {n: {k: v.detach().clone() for k, v in vn.Adapter(model, n).named_parameters()} for n in plans}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-4) -> None:
    assert a.keys() == b.keys() and a
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=atol, rtol=0, msg=lambda m, k=k: f"{k}: {m}")


def start(plan: Any) -> dict[str, torch.Tensor]:
    model = ready()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapter = vn.attach(model, plan.plan if isinstance(plan, Candidate) else plan, name="x")
    return {k: v.detach().clone() for k, v in adapter.named_parameters()}


def test_each_candidate_is_what_it_is_alone() -> None:
    together, weights = run(PLANS, best=False)
    assert {r.status for r in together.candidates.values()} == {"finished"}
    for name, plan in PLANS.items():
        alone, own = run({name: plan}, best=False)
        same(weights[name], own[name])
        begin = start(plan)
        assert max(float((own[name][k] - begin[k]).abs().max()) for k in begin) > 1e-3, f"{name} did not move"
        a, b = together.candidates[name], alone.candidates[name]
        assert [s for s, _ in a.losses] == list(range(1, 21)) and a.examples == 80
        torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), atol=1e-4, rtol=1e-4)
        assert abs(a.best - b.best) < 0.06


FEW = {n: PLANS[n] for n in ("lora", "prefix", "bitfit", "unipelt")}


def test_halving_gives_the_rows_to_the_others_by_plan() -> None:
    report, weights = run(FEW, halving=2, spare="rows")
    assert report.rungs == [(5, 2), (10, 1)] and report.batches == [(0, 4), (5, 8), (10, 16)]
    ended = {n: (r.status, r.step) for n, r in report.candidates.items()}
    assert sorted(ended.values()) == [("dropped", 5), ("dropped", 5), ("dropped", 10), ("finished", 20)]
    assert ended[report.winner] == ("finished", 20)
    rung = {n: dict(r.scores)[5] for n, r in report.candidates.items()}
    gone = [n for n, e in ended.items() if e == ("dropped", 5)]
    assert max(rung[n] for n in gone) <= min(rung[n] for n in rung if n not in gone)
    winner = report.candidates[report.winner]
    assert winner.examples == 4 * 5 + 8 * 5 + 16 * 10 and report.plan == vn.Plan.from_dict(winner.plan)
    alone, own = run({report.winner: FEW[report.winner]}, batch=report.batches, evaluate_every=5)
    same(weights[report.winner], own[report.winner])
    assert alone.batches == report.batches
    assert json.loads(json.dumps(report.to_dict()))["winner"] == report.winner
    assert "dropped" in str(report) and "2 go on" in str(report)


def test_halving_makes_steps_cheaper_by_default() -> None:
    report, _ = run(FEW, halving=4)
    assert report.rungs == [(5, 1)] and report.batches == [(0, 4)]
    assert sorted(r.examples for r in report.candidates.values()) == [20, 20, 20, 80]


def test_finalists_run_to_the_end() -> None:
    report, _ = run(FEW, halving=2, finalists=2)
    assert report.rungs == [(5, 2)]
    assert sorted((r.status, r.step) for r in report.candidates.values()) == [("dropped", 5)] * 2 + [("finished", 20)] * 2
    best = [r for r in report.candidates.values() if r.status == "finished"]
    assert report.winner == max(best, key=lambda r: (r.best, -r.parameters)).name
    assert run(FEW, halving=4, finalists=3)[0].rungs == [(5, 3)] and run(FEW, halving=2, finalists=4)[0].rungs == []


RECORDED = FEW | {"ada": vn.AdaLoRA(2, target=1) + HEAD, "prompt": PLANS["prompt"], "drop": vn.Bottleneck(2, drop=1) + HEAD}


@pytest.mark.parametrize("more", [{}, {"halving": 3, "evaluate_every": 3}, {"spare": "rows", "halving": 2}, {"max_rows": 8}], ids=str)
def test_steps_from_tables_are_the_same_steps(more: dict[str, Any]) -> None:
    """What a GPU records is run one by one here; the recording itself is checked by benchmarks/selection/race.py there."""
    plain, weights = run(RECORDED, **more)
    tables, own = run(RECORDED, graph=True, **more)
    assert {n: r.status for n, r in plain.candidates.items()} == {n: r.status for n, r in tables.candidates.items()}
    for name in RECORDED:
        same(weights[name], own[name], atol=1e-5)
        assert plain.candidates[name].scores == tables.candidates[name].scores
        assert [s for s, _ in plain.candidates[name].losses] == [s for s, _ in tables.candidates[name].losses]


def test_a_recording_harms_no_other_when_one_diverges() -> None:
    plans = {"lora": FEW["lora"], "wild": Candidate(vn.BitFit() + vn.LoRA(2, at="linear") + HEAD, lr=1e30, clip=None, warmup=0.0)}
    report, weights = run(plans, best=False, graph=True)
    assert report.candidates["wild"].status == "diverged" and report.winner == "lora"
    same(weights["lora"], run({"lora": plans["lora"]}, best=False)[1]["lora"])


def test_a_candidate_that_diverges_harms_no_other() -> None:
    plans = {"lora": FEW["lora"], "wild": Candidate(vn.BitFit() + vn.LoRA(2, at="linear") + HEAD, lr=1e30, clip=None, warmup=0.0), "unipelt": FEW["unipelt"]}
    report, weights = run(plans, best=False)
    wild = report.candidates["wild"]
    assert wild.status == "diverged" and "not finite" not in wild.note and "nan" in wild.note and wild.step < 20
    for n in ("lora", "unipelt"):
        _, own = run({n: plans[n]}, best=False)
        same(weights[n], own[n])
        assert all(bool(v.isfinite().all()) for v in weights[n].values())
    assert report.winner in ("lora", "unipelt")
    only, _ = run({"wild": plans["wild"]})
    assert only.winner is None and only.plan is None and "diverged" in str(only)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [7, 13])
def test_a_race_that_was_killed_goes_on(at: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"halving": 2, "spare": "rows", "evaluate_every": 4, "checkpoint_every": 3}
    whole, weights = run(FEW, **options)

    def kill(step: int, records: Any) -> None:
        if step == at:
            raise Killed

    model = ready()
    with unchanged(model), pytest.raises(Killed):
        race(model, FEW, TRAIN, DEV, steps=20, batch=4, seed=3, checkpoint=tmp_path, on_step=kill, **options)
    assert json.loads((tmp_path / "race.json").read_text())["step"] == at // 3 * 3
    assert len(list(tmp_path.iterdir())) == 2
    steps: list[int] = []
    again, own = run(FEW, checkpoint=tmp_path, on_step=lambda step, _: steps.append(step), **options)
    assert steps[0] == at // 3 * 3 + 1
    for n in FEW:
        same(own[n], weights[n], atol=0.0)
        a, b = again.candidates[n], whole.candidates[n]
        assert (a.status, a.scores, a.losses, a.best) == (b.status, b.scores, b.losses, b.best)
    assert again.winner == whole.winner
    finished, own = run(FEW, checkpoint=tmp_path, **options)
    assert finished.scores == whole.scores
    same(own[whole.winner], weights[whole.winner], atol=0.0)


def test_a_folder_of_another_race_or_a_damaged_one(tmp_path: Path) -> None:
    run(FEW, checkpoint=tmp_path, steps=4)
    model = ready()
    base = {"steps": 4, "batch": 4, "seed": 3, "checkpoint": tmp_path}
    with refuses(vn.ConfigError, "other settings", "delete the folder", model=model):
        race(model, FEW, TRAIN, DEV, **base | {"seed": 4})
    with refuses(vn.ConfigError, "other candidates", model=model):
        race(model, FEW | {"lora": vn.LoRA(3) + HEAD}, TRAIN, DEV, **base)
    weights = next(tmp_path.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with refuses(vn.StoreError, "SHA-256|truncated", model=model):
        race(model, FEW, TRAIN, DEV, **base)
    (tmp_path / "race.json").write_text("{")
    with refuses(vn.StoreError, "not a JSON file", model=model):
        race(model, FEW, TRAIN, DEV, **base)


def test_what_cannot_be_routed_runs_alone_in_the_same_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vn.IA3, "routable", False)
    plans = {n: PLANS[n] for n in ("lora", "ia3", "prefix")}
    report, weights = run(plans, best=False)
    assert [r.together for r in report.candidates.values()] == [True, False, True]
    assert "ia3" in report.candidates["ia3"].note and "run alone" in str(report)
    for n in plans:
        same(weights[n], run({n: plans[n]}, best=False)[1][n])


def test_apart_and_in_several_forwards() -> None:
    want, weights = run(FEW, best=False)
    for options in ({"together": False}, {"max_rows": 8}, {"max_rows": 1}):
        got, own = run(FEW, best=False, **options)
        for n in FEW:
            same(own[n], weights[n])
        assert got.steps == want.steps


def test_the_best_weights_stay_and_patience_stops() -> None:
    scores = iter([0.2, 0.9, 0.9, 0.8, 0.7, 0.6])
    model = ready()
    seen: list[dict[str, torch.Tensor]] = []

    def judge(m: Any) -> float:
        assert vn.active(m) == ("lora",) and not m.training
        seen.append({k: v.detach().clone() for k, v in vn.Adapter(m, "lora").named_parameters()})
        return next(scores)

    plans = {"lora": Candidate(FEW["lora"], patience=3)}
    report = race(model, plans, TRAIN, judge, steps=40, batch=4, evaluate_every=2)
    record = report.candidates["lora"]
    assert (record.status, record.best, record.best_step, record.step) == ("stopped", 0.9, 4, 10) and report.winner == "lora"
    same({k: v.detach() for k, v in vn.Adapter(model, "lora").named_parameters()}, seen[1], atol=0.0)


def test_keep() -> None:
    for keep, left in (("winner", 1), ("all", 4), ("none", 0)):
        model = ready()
        report = race(model, FEW, TRAIN, DEV, steps=2, batch=2, keep=keep)
        state = model.__dict__.get("_veneer_state")
        assert len(state.adapters if state else ()) == left
        if left:
            assert vn.active(model) == (report.winner,)
    vn.detach(model) if state else None
    with unchanged(model):
        race(model, FEW, TRAIN, DEV, steps=2, batch=2, keep="none")


def test_a_language_model_and_tensors() -> None:
    model = build("llama").eval()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (12, 6), generator=g)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    data = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    plans = {"lora": vn.LoRA(2), "prefix": vn.Prefix(2), "gated": vn.gated(vn.LoRA(2) + vn.Bottleneck(2))}
    report = race(model, plans, data, data, steps=6, batch=4, keep="all", best=False, seed=1)
    for n, plan in plans.items():
        other = build("llama").eval()
        alone = race(other, {n: plan}, data, data, steps=6, batch=4, keep="all", best=False, seed=1)
        same({k: v.detach() for k, v in vn.Adapter(other, n).named_parameters()}, {k: v.detach() for k, v in vn.Adapter(model, n).named_parameters()})
        torch.testing.assert_close(alone.scores[n], report.scores[n], atol=1e-4, rtol=1e-4)
    # by hand: the score is minus the model's own loss
    vn.activate(model, "lora")
    with torch.no_grad():
        torch.testing.assert_close(-float(model(**data).loss), report.scores["lora"], atol=1e-4, rtol=1e-4)


def test_bad_input() -> None:
    model = ready()
    good: dict[str, Any] = {"steps": 2, "batch": 2}

    def bad(error: Any, *texts: str, plans: Any = FEW, train: Any = TRAIN, dev: Any = DEV, **options: Any) -> None:
        with refuses(error, *texts, model=model):
            race(model, plans, train, dev, **good | options)

    bad(vn.ConfigError, "needs candidates", plans={})
    bad(vn.PlanError, "no preset 'lroa'.*lora", plans={"a": "lroa"})
    bad(vn.ConfigError, "steps is 0", steps=0)
    bad(vn.ConfigError, "batch is", batch=[(3, 4)])
    bad(vn.ConfigError, "halving is 1", halving=1)
    bad(vn.ConfigError, "spare is 'row'.*rows", spare="row")
    bad(vn.ConfigError, "keep is 'al'.*all", keep="al")
    bad(vn.DataError, "needs 'labels'", train=[{"input_ids": [1]}])
    bad(vn.DataError, "list of dicts", dev=[])
    bad(vn.SiteError, "candidate b", "Did you mean", plans={"a": vn.LoRA(2), "b": vn.LoRA(2, at="attn.w")})
    with refuses(vn.ConfigError, "lr is -1"):
        Candidate(vn.LoRA(2), lr=-1)
    with refuses(vn.ConfigError, "schedule 'cosin'.*cosine"):
        Candidate(vn.LoRA(2), schedule="cosin")
    vn.attach(model, vn.LoRA(2), name="lora")
    with refuses(vn.AdapterError, "attached already", model=model):
        race(model, FEW, TRAIN, DEV, **good)
