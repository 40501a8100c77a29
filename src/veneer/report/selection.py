"""Why this plan: the page of a selection, a race, a settling, or of all three. Plain data in."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import charts, heat
from .page import Page, plotly, shown
from .run import as_yaml, duration, read

REPORT = "report.html"
FILES = {"selection": "selection.json", "race": "race.json", "gates": "gates.json", "settled": "settled.json"}
# objective -> (title of its chart, axis, scale)
AGAINST = {
    "parameters": ("Score against trainable parameters", "trainable parameters", 1.0, "log"),
    "latency": ("Score against latency", "time of inference over the base's", 1.0, "linear"),
    "memory": ("Score against memory", "peak of a training step, MB", 1e-6, "linear"),
    "seconds": ("Score against training time", "seconds of training in full", 1.0, "log"),
}
MOST_LINES = 8  # of the race that have a colour and a name of their own


def report(folder: str | Path) -> Path:
    """Write `report.html` into `folder` from what is there: selection.json (Selection.to_dict), race.json
    (RaceReport.to_dict), gates.json ({"rows": those of a GateReport}) and settled.json (SettleReport as a dict).

    Raises: ConfigError where none of them is there; StoreError where the page cannot be written.
    """
    folder = Path(folder)
    found = {key: data for key, name in FILES.items() if (data := read(folder / name)) is not None}
    if not found:
        raise ConfigError(f"no selection here: there is none of {', '.join(FILES.values())}", where=str(folder), fix="Give the folder of `veneer select`")
    gates = found.pop("gates", {}).get("rows")
    return build(f"Selection: {folder.name}", gates=gates, **found).write(folder / REPORT)


def build(
    title: str,
    *,
    selection: dict[str, Any] | None = None,
    race: dict[str, Any] | None = None,
    gates: list[dict[str, Any]] | None = None,
    settled: dict[str, Any] | None = None,
) -> Page:
    """The page; a part that is None is left out.

    selection  as Selection.to_dict gives it: trials, front (numbers), chosen, reason, budget, objectives, cost, settings
    race       as RaceReport.to_dict gives it: candidates (name -> losses, scores, status, …), winner, rungs, batches
    gates      rows of a GateReport
    settled    plan, parts (method, module, mean, std, parameters, kept, loss and, where known, its loss_std), before, after
    """
    settings = (selection or race or {}).get("settings", {})
    page = Page(title, ", ".join(f"{k} {shown(settings[k])}" for k in ("model", "metric", "examples", "seed") if k in settings))
    if selection is not None:
        _recommended(page, selection)
        _fronts(page, selection)
        _selection_curves(page, selection)
    if race is not None:
        _race(page, race)
    if gates:
        heat.add(page, gates)
    if settled is not None:
        _settled(page, settled)
    if selection is not None:
        _tried(page, selection)
    return page


def label(plan: Any) -> str:
    """The plan as Python, on one line."""
    from ..plan import Plan

    return str(Plan.from_dict(plan))


def brief(trial: dict[str, Any]) -> str:
    """The trial's number and the names of its methods, without their sizes and places."""
    names = re.sub(r"\([^()]*\)", "", label(trial["plan"])).removesuffix(" + Full")
    return f"{trial['number']}: {names}"


def _by_score(score: float | None) -> tuple[bool, float]:
    """A key that puts the highest score first, and what has none last."""
    return (score is None or not math.isfinite(score), -(score or 0.0))


# -- a selection ------------------------------------------------------------------------------------------------------
def _best(selection: dict[str, Any]) -> dict[str, Any]:
    return next(t for t in selection["trials"] if t["number"] == selection["chosen"])


def _recommended(page: Page, selection: dict[str, Any]) -> None:
    best, cost = _best(selection), selection["cost"]
    o = best["objectives"]
    spread = f" ± {shown(best['noise'])}" if best.get("noise") else ""
    page.tiles(
        {
            "score": f"{shown(o.get('score'))}{spread}", "trainable parameters": o.get("parameters") and int(o["parameters"]),
            "share of the base": f"{100 * best['share']:.3f}%", "latency over the base's": o.get("latency") and f"{o['latency']:.2f}x",
            "candidates": len(selection["trials"]), "the search took": duration(cost.get("seconds", 0)),
        }
    )  # fmt: skip
    page.section("Recommended plan", f"Trial {best['number']}: {label(best['plan'])}")
    page.text(f"Why: {selection['reason']}.")
    if selection.get("budget"):
        page.text(f"Budget: {', '.join(f'{k} {v}' for k, v in selection['budget'].items())}.")
    page.code(as_yaml({"plan": best["plan"], "learning_rate": best["rate"]}))
    page.text("Put these lines into the configuration of a run, and train it: veneer train CONFIG.yaml")


def _fronts(page: Page, selection: dict[str, Any]) -> None:
    page.section("Front", "A plan is on the front where no other is at least as good in everything and better in one. Point at a mark for its plan.")
    for key, (title, axis, unit, scale) in AGAINST.items():
        trials = [t for t in selection["trials"] if _known(t, "score") and _known(t, key)]
        if trials:
            page.figure(front(trials, selection, key, axis, unit, scale), title)


def _known(trial: dict[str, Any], key: str) -> bool:
    value = trial["objectives"].get(key)
    return value is not None and math.isfinite(value)


def front(trials: list[dict[str, Any]], selection: dict[str, Any], key: str, axis: str, unit: float, scale: str) -> Any:
    """Score over `key`: the front joined by steps, the recommended plan as a star, the rest behind."""
    go = plotly()
    members = sorted((t for t in trials if t["number"] in selection["front"]), key=lambda t: t["objectives"][key])
    rest = [t for t in trials if t["number"] not in selection["front"] and t["number"] != selection["chosen"]]
    groups = (
        ("trained in part", [t for t in rest if t["status"] != "complete"], {"symbol": "circle-open", "size": 8, "color": charts.COLOURS[-1]}),
        ("trained in full", [t for t in rest if t["status"] == "complete"], {"symbol": "circle", "size": 8, "color": charts.COLOURS[-1]}),
        ("front", [t for t in members if t["number"] != selection["chosen"]], {"symbol": "circle", "size": 10, "color": charts.COLOURS[0]}),
        ("recommended", [t for t in trials if t["number"] == selection["chosen"]], {"symbol": "star", "size": 17, "color": charts.COLOURS[1]}),
    )
    figure = go.Figure()
    # the best score that this much of `key` buys: a stair, whose corners are this chart's own front
    stair: list[dict[str, Any]] = []
    for t in members:
        if not stair or t["objectives"]["score"] > stair[-1]["objectives"]["score"]:
            stair.append(t)
    figure.add_scatter(
        x=[t["objectives"][key] * unit for t in stair], y=[t["objectives"]["score"] for t in stair], mode="lines", hoverinfo="skip", showlegend=False,
        line={"shape": "hv", "color": charts.COLOURS[0], "width": 1.5, "dash": "dot"}, name="stair",
    )  # fmt: skip
    shown_groups = [g for g in groups if g[1]]
    for name, here, marker in shown_groups:
        figure.add_scatter(
            x=[t["objectives"][key] * unit for t in here], y=[t["objectives"]["score"] for t in here], mode="markers", name=name, marker=marker,
            error_y={"type": "data", "array": [t.get("noise") or 0 for t in here], "thickness": 1, "width": 3} if name in ("front", "recommended") else None,
            customdata=[_words(t) for t in here], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(charts.layout(380, x=axis, y="score", series=len(shown_groups)), hovermode="closest")
    if scale == "log":
        charts.logarithmic(figure, [t["objectives"][key] * unit for t in trials])
    return figure


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _words(t: dict[str, Any]) -> str:
    o = t["objectives"]
    facts = [
        f"score {shown(o.get('score'))}" + (f" ± {shown(t['noise'])}" if t.get("noise") else ""),
        f"{int(o['parameters']):,} parameters" if "parameters" in o else "",
    ]
    facts += [f"latency {o['latency']:.2f}x" if "latency" in o else "", _bytes(o["memory"]) if "memory" in o else ""]
    plan = label(t["plan"]).replace(" + ", " +\n    ")
    return f"trial {t['number']}, {t['status']}\n{', '.join(f for f in facts if f)}\n{plan}"


def _selection_curves(page: Page, selection: dict[str, Any]) -> None:
    """Each candidate's curve on the longest rung that it reached; those that went no further end in a cross."""
    order = sorted(
        selection["trials"],
        key=lambda t: (t["number"] != selection["chosen"], t["number"] not in selection["front"], -(t["objectives"].get("score") or -math.inf)),
    )
    named = {t["number"] for t in order[:MOST_LINES]}
    found: dict[str, dict[str, Any]] = {"loss": {}, "score": {}}
    ends: dict[str, str] = {}
    for t in selection["trials"]:
        rung = next(reversed(t.get("curves") or {"": {}}))
        name = brief(t)
        for what in found:
            points = (t.get("curves") or {}).get(rung, {}).get(what) or []
            if points:
                found[what][name] = ([p[0] for p in points], [p[1] for p in points])
        if t["status"] != "complete":
            ends[name] = f"{t['status']}: {t.get('why', '')}\n{label(t['plan'])}"
    behind = {brief(t) for t in selection["trials"] if t["number"] not in named}
    if not any(found.values()):
        return
    page.section("Race", "Each candidate on the longest training that it was given; one that ended early ends in a cross. The front is in colour.")
    for what, title in (("loss", "Training loss"), ("score", "Score on the evaluation rows")):
        if any(len(xs) > 1 for xs, _ in found[what].values()):  # one point each is in the table already
            here = {n: why for n, why in ends.items() if n in found[what]}
            page.figure(charts.curves(found[what], y=what, ends=here, behind=behind), title, wide=len(found[what]) > 3)


def _tried(page: Page, selection: dict[str, Any]) -> None:
    cost = selection["cost"]
    status: dict[str, int] = {}
    for t in selection["trials"]:
        status[t["status"]] = status.get(t["status"], 0) + 1
    page.section("What was tried, and what it cost")
    page.text(
        f"{len(selection['trials'])} candidates ({', '.join(f'{n} {s}' for s, n in status.items())}): {shown(int(cost.get('steps', 0)))} steps on "
        f"{shown(int(cost.get('examples', 0)))} examples in {duration(cost.get('seconds', 0))}."
    )
    trials = sorted(selection["trials"], key=lambda t: (t["status"] != "complete", *_by_score(t["objectives"].get("score")), t["number"]))
    rows = []
    for t in trials:
        o, c = t["objectives"], t.get("cost") or {}
        rows.append(
            (
                t["number"], "recommended" if t["number"] == selection["chosen"] else "front" if t["number"] in selection["front"] else "", o.get("score"),
                t.get("noise") or None, o.get("parameters") and int(o["parameters"]), (t["share"], f"{100 * t['share']:.3f}%"), o.get("latency"),
                o.get("memory") and (o["memory"], _bytes(o["memory"])), t.get("pscp"), int(c.get("steps", 0)), c.get("seconds"), t["status"],
                label(t["plan"]), t.get("why", ""),
            )
        )  # fmt: skip
    heads = ("trial", "", "score", "±", "parameters", "share", "latency", "memory", "PSCP", "steps", "seconds", "status", "plan", "why")
    page.table(heads, rows, marked=[i for i, r in enumerate(rows) if r[1] == "recommended"])
    page.section("Settings")
    page.facts({**selection["settings"], "objectives": selection["objectives"], "device": selection.get("device") or None})


# -- a race -----------------------------------------------------------------------------------------------------------
def _race(page: Page, race: dict[str, Any]) -> None:
    records = race["candidates"]
    order = sorted(records, key=lambda n: (n != race["winner"], -(records[n]["best"] if records[n]["best"] is not None else -math.inf)))
    ends = {
        n: f"{records[n]['status']} at step {records[n]['step']}: {records[n]['note']}" for n in order if records[n]["status"] not in ("finished", "running")
    }
    page.section("Race together", f"{len(records)} candidates on one base in {duration(race['seconds'])}; the winner is {race['winner'] or 'none'}.")
    for key, what, title in (("losses", "loss", "Training loss"), ("scores", "score", "Score on the evaluation rows")):
        found = {n: ([p[0] for p in records[n][key]], [p[1] for p in records[n][key]]) for n in order if records[n][key]}
        if found:
            page.figure(charts.curves(found, y=what, ends={n: why for n, why in ends.items() if n in found}, behind=set(order[MOST_LINES:])), title)
    rows = [
        (n, r["best"], r["best_step"], r["parameters"], r["step"], r["examples"], r["seconds"], r["status"], r["note"], label(r["plan"]))
        for n, r in ((n, records[n]) for n in order)
    ]
    heads = ("candidate", "best score", "at step", "parameters", "steps", "examples", "seconds", "status", "note", "plan")
    page.table(heads, rows, marked=[0] if race["winner"] else [])
    if race["winner"]:
        page.code(as_yaml({"plan": records[race["winner"]]["plan"]}))


# -- a settling -------------------------------------------------------------------------------------------------------
def _settled(page: Page, settled: dict[str, Any]) -> None:
    parts = settled["parts"]
    names = [f"{p['method']} {p['module']}" for p in parts]
    dropped = [not p["kept"] for p in parts]
    start = "" if settled.get("rewound") is None else f" What is left started anew (seed {settled['rewound']}) and trained for {settled['steps']:,} steps."
    page.section(
        "Settled",
        f"{settled['before']:,} trainable parameters became {settled['after']:,}.{start} Grey: dropped. A gate's size alone proves nothing: see the loss.",
    )
    if any(p["loss"] is not None for p in parts):
        caption = "Score of the whole minus score without the part, on held-out data."
        page.figure(
            charts.bars(names, [p["loss"] for p in parts], [p.get("loss_std") for p in parts], x="loss of score if removed", faded=dropped), "Ablation", caption
        )
    page.figure(
        charts.bars(names, [p["mean"] for p in parts], [p["std"] for p in parts], x="mean gate", faded=dropped), "Gates", "± standard deviation over examples."
    )
    page.table(
        ("method", "module", "layers", "mean gate", "±", "loss of score if removed", "parameters", "kept"),
        [(p["method"], p["module"], ", ".join(map(str, p["layers"])), p["mean"], p["std"], p["loss"], p["parameters"], p["kept"]) for p in parts],
    )
    plan = settled["plan"] if isinstance(settled["plan"], dict) else settled["plan"].to_dict()
    page.code(as_yaml({"plan": plan}))
