"""The page that explains a choice, from what a search, a race, a settling and the gates really gave."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
import yaml

import veneer as vn
from browser import check_drawn
from browser import figures as charts_of
from helpers import build
from veneer.gates import gates
from veneer.report import charts
from veneer.report.selection import build as page
from veneer.report.selection import report
from veneer.select.race import race
from veneer.select.report import Selection, Trial

HEAD = vn.Full(at="head")
PLANS = {"lora": vn.LoRA(2) + HEAD, "ia3": vn.IA3() + HEAD, "bottleneck": vn.Bottleneck(4) + HEAD, "apl": vn.preset("unipelt-apl") + HEAD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """race.json, gates.json, settled.json of a small BERT, and a selection whose trials are the race's candidates."""
    out = tmp_path_factory.mktemp("choice")
    rng = random.Random(1)
    rows = [{"input_ids": [rng.randrange(5, 40) for _ in range(rng.randrange(2, 9))]} for _ in range(30)]
    rows = [r | {"labels": r["input_ids"][0] % 3} for r in rows]
    model = build("bert").eval()
    raced = race(model, PLANS, rows[:20], rows[20:], steps=9, batch=4, halving=2, evaluate_every=3, keep="all")
    (out / "race.json").write_text(json.dumps(raced.to_dict()))
    vn.activate(model, "apl")
    batch = [{"input_ids": torch.tensor([r["input_ids"][:2] for r in rows])}]
    (out / "gates.json").write_text(json.dumps({"rows": gates(model, batch, "apl").rows}))
    truth = torch.tensor([r["labels"] for r in rows])

    def score(m: Any) -> float:
        with torch.no_grad():
            return -float(torch.nn.functional.cross_entropy(m(**batch[0]).logits, truth))

    settled = vn.settle(model, batch, keep=2, name="apl", score=score)
    (out / "settled.json").write_text(json.dumps(vars(settled) | {"plan": settled.plan.to_dict()}))
    trials = []
    for i, (name, r) in enumerate(raced.candidates.items()):
        done = r.status == "finished"
        objectives = {"score": r.best, "parameters": r.parameters, "latency": 1 + 0.1 * i, "memory": 1e6 * (i + 1), "seconds": r.seconds}
        curves = {"1/3": {"loss": r.losses[:3], "score": r.scores[:1]}} | ({"1": {"loss": r.losses, "score": r.scores}} if done else {})
        cost = {"steps": r.step, "examples": r.examples, "seconds": r.seconds}
        trials.append(Trial(i, PLANS[name].to_dict(), 1e-3, "complete" if done else "dropped", objectives, 0.01, 0.02, curves=curves, cost=cost, why=r.note))
    best = next(t for t in trials if t.status == "complete")
    cost = {k: sum(t.cost[k] for t in trials) for k in ("steps", "examples", "seconds")}
    Selection(trials, best.number, "the best score", {"params": "5%"}, {}, ("score", "parameters"), cost, {"model": "small BERT", "seed": 0}).save(out)
    return out


def test_every_chart_is_drawn(folder):
    figures = check_drawn(folder / "report.html")
    text = (folder / "report.html").read_text()
    for heading in ("Recommended plan", "Front", "Race", "Race together", "Gates", "Settled", "What was tried, and what it cost"):
        assert f">{heading}</h2>" in text
    assert len(figures) == 4 + 2 + 2 + 1 + 2  # fronts, curves of the search, of the race, gates, ablation and mean gates


def test_the_page_says_what_was_measured(folder):
    figures = charts_of((folder / "report.html").read_text())
    selection, raced, settled = (json.loads((folder / f"{n}.json").read_text()) for n in ("selection", "race", "settled"))
    best = next(t for t in selection["trials"] if t["number"] == selection["chosen"])
    star = next(t for t in figures[0].data if t.name == "recommended")
    assert (star.x[0], star.y[0]) == (best["objectives"]["parameters"], best["objectives"]["score"]) and "LoRA" in "".join(
        t.customdata[0] for f in figures[:1] for t in f.data[1:]
    )
    marks = [x for t in figures[0].data if t.mode == "markers" for x in t.x]
    assert sorted(marks) == sorted(t["objectives"]["parameters"] for t in selection["trials"])
    lines = {t.name: list(t.y) for t in figures[6].data if t.mode != "markers"}
    assert lines == {n: [p[1] for p in r["losses"]] for n, r in raced["candidates"].items()}
    crosses = next(t for t in figures[6].data if t.mode == "markers")
    dropped = [r for r in raced["candidates"].values() if r["status"] == "dropped"]
    assert dropped and sorted(crosses.x) == sorted(r["losses"][-1][0] for r in dropped) and all("dropped" in c for c in crosses.customdata)
    ablation = figures[-2].data[0]
    assert list(ablation.x) == [p["loss"] for p in settled["parts"]] and all(v is not None for v in ablation.x)
    assert list(figures[-1].data[0].error_x.array) == [p["std"] for p in settled["parts"]]


def test_the_recommended_plan_is_ready_for_a_run(folder):
    from html import unescape

    from veneer.train.config import make_config

    text = (folder / "report.html").read_text()
    lines = yaml.safe_load(unescape(text.split("<pre><code>")[1].split("</code>")[0]))
    config = make_config({"model": "minilm", "data": {"train": "tweets"}} | lines)
    assert vn.Plan.from_dict(config.plan) == Selection.load(folder).recommended and config.learning_rate == 1e-3


def test_parts_that_are_missing_are_left_out(folder, tmp_path):
    for name in ("race", "gates", "settled"):
        (tmp_path / f"{name}.json").write_text((folder / f"{name}.json").read_text())
        text = report(tmp_path).read_text()
        (tmp_path / f"{name}.json").unlink()
        assert "Recommended plan" not in text and text.count('class="chart"') == {"race": 2, "gates": 1, "settled": 2}[name]
    with pytest.raises(vn.ConfigError, match="no selection here"):
        report(tmp_path)
    (tmp_path / "selection.json").write_text("{")
    with pytest.raises(vn.ConfigError, match="cannot be read"):
        report(tmp_path)


def test_an_axis_has_ticks_however_narrow():
    for values, kind in (([6.5, 8.0], None), ([7.0, 7.0], None), ([1000.0, 90000.0], "log")):
        figure = go.Figure()
        charts.logarithmic(figure, values)
        low, high = figure.layout.xaxis.range
        assert figure.layout.xaxis.type == kind
        assert low < (math.log10(values[0]) if kind else values[0]) and high > (math.log10(values[1]) if kind else values[1])


def test_candidates_without_numbers_are_in_the_table_and_not_in_the_charts():
    """One that diverged before it had a score, one that was never trained, one whose loss is no number."""
    plan = {"method": "lora"}
    trials = [
        Trial(0, plan, 1e-3, "complete", {"score": 0.5, "parameters": 10}),
        Trial(1, plan, 1e-3, "diverged", {"parameters": 20}, curves={"1": {"loss": [[1, 2.0], [2, float("nan")]], "score": []}}, why="<its loss>"),
        Trial(2, plan, 1e-3, "over budget", {"parameters": 3000}),
    ]
    made = page("x", selection=Selection(trials, 0, "alone", {}, {}, ("score", "parameters"), {}, {}).to_dict())
    text = made.html()
    assert text.count("over budget") >= 1 and "&lt;its loss&gt;" in text and text.count('class="chart"') == 2
