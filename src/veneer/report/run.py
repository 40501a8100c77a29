"""The page of one run: what it learnt, how well, with what, and how to repeat it. Read from the run's folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import charts, heat
from .page import Page, Picture, shown

REPORT, OBSERVED, GATES, CONFIG = "report.html", "evaluation.json", "gates.json", "config.yaml"
MOST_ROWS = 200
# ends of the names in Trainer's log that are no scores
SPEED = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "model_preparation_time")


def report(folder: str | Path) -> Path:
    """Write `report.html` in the folder of a run, finished or not, from what stands there.

    run.json       config, plan, labels, versions, result (metrics, log, parameters, hardware, seconds)
    evaluation.json  labels with counts (of each truth and answer) or decisions (hits, false and missed of each label),
                   mistakes, numbers (truth, answer), samples
    gates.json     rows of a GateReport

    Sections whose data is missing are left out. Raises: ConfigError for a folder that is no run; StoreError where the page cannot be written.
    """
    folder = Path(folder)
    run = read(folder / "run.json")
    if run is None or "config" not in run:
        raise ConfigError("this folder is not a run: it has no run.json", where=str(folder), fix="Give the folder that `veneer train` wrote")
    return build(run, read(folder / OBSERVED) or {}, (read(folder / GATES) or {}).get("rows", []), log_of(folder, run), str(folder)).write(folder / REPORT)


def build(run: dict[str, Any], observed: dict[str, Any], gates: list[dict[str, Any]], log: list[dict[str, Any]], where: str) -> Page:
    """The page from its data, see `report`."""
    config, result = run["config"], run.get("result") or {}
    page = Page(f"{where}: {config.get('model', '')}", f"{config.get('task', '')} on {config.get('data', {}).get('train', '')}")
    _numbers(page, result, log)
    _curves(page, log)
    if gates:
        heat.add(page, gates)
    _answers(page, observed)
    _parameters(page, result, run.get("plan"))
    _repeat(page, run, result, where)
    return page


def log_of(folder: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """What was logged: of a finished run from run.json, else from its last checkpoint."""
    if (run.get("result") or {}).get("log"):
        return run["result"]["log"]
    states = sorted(folder.glob("checkpoints/checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    return (read(states[-1]) or {}).get("log_history", []) if states else []


def series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of `key` in the log; the first at each step, since the last evaluation is of the best checkpoint."""
    found: dict[int, float] = {}
    for e in log:
        if isinstance(e.get(key), (int, float)) and "step" in e:
            found.setdefault(e["step"], e[key])
    return list(found), list(found.values())


def scores_of(log: list[dict[str, Any]]) -> list[str]:
    """The names of the evaluation's scores, without "eval_", the loss and the speeds left out."""
    names = dict.fromkeys(k.removeprefix("eval_") for e in log for k in e if k.startswith("eval_"))
    return [n for n in names if n != "loss" and not n.endswith(SPEED)]


def read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot be read: {e}", where=str(path)) from None
    if not isinstance(found, dict):
        raise ConfigError("not one of ours", where=str(path))
    return found


def _numbers(page: Page, result: dict[str, Any], log: list[dict[str, Any]]) -> None:
    if not result:
        page.text("This run is not finished: the curves are those of its last checkpoint. The command that started it goes on from there.")
        return
    tiles = {k.replace("_", " "): v for k, v in result["metrics"].items()}
    if "loss" in tiles:
        tiles["evaluation loss"] = tiles.pop("loss")
    speed = next((e["train_tokens_per_second"] for e in reversed(log) if "train_tokens_per_second" in e), None)
    peak = (result.get("hardware") or {}).get("peak memory")
    page.tiles(
        tiles
        | {"trainable parameters": result["trainable"], "share of the base": f"{100 * result['share']:.3f}%", "training time": duration(result["seconds"])}
        | ({"tokens a second": speed} if speed else {})
        | ({"peak memory": peak} if peak else {})
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{seconds:.1f} s"


def _curves(page: Page, log: list[dict[str, Any]]) -> None:
    loss = {name: series(log, key) for name, key in (("training", "loss"), ("evaluation", "eval_loss"))}
    loss = {name: found for name, found in loss.items() if found[0]}
    if not loss:
        return
    page.section("Curves")
    page.figure(charts.curves(loss, y="loss"), "Loss")
    scores = {n: series(log, f"eval_{n}") for n in scores_of(log)}
    if scores:
        page.figure(charts.curves(scores, y="score"), "Scores on the evaluation rows")
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm")):
        found = series(log, key)
        if found[0]:
            page.figure(charts.curves({title.lower(): found}, y=title.lower()), title)


def _answers(page: Page, observed: dict[str, Any]) -> None:
    labels, counts = observed.get("labels"), observed.get("counts")
    if labels and counts:
        page.section("Classes", f"{sum(map(sum, counts)):,} answers on the evaluation rows.")
        page.figure(
            charts.confusion(labels, counts),
            "Confusion matrix",
            "Rows are the truth. The colour is the share of that class that got this answer.",
            wide=len(labels) > 12,
        )
        page.table(("class", "precision", "recall", "F1", "examples"), per_class(labels, counts))
    if labels and observed.get("decisions"):
        page.section("Classes", "Each class decided by itself, at probability 0.5.")
        page.table(("class", "precision", "recall", "F1", "examples"), [_of_counts(n, *three) for n, three in zip(labels, observed["decisions"], strict=True)])
    if observed.get("numbers"):
        page.section("Answers")
        page.figure(charts.agreement(*zip(*observed["numbers"], strict=True)), "Answer against truth", "On the line both are equal.")
    if observed.get("mistakes"):
        page.section("Mistakes", "The surest wrong answers first.")
        mistakes = observed["mistakes"][:MOST_ROWS]
        what = "picture" if all(m.get("picture") for m in mistakes) else "text"
        shows = [Picture(m["picture"], Path(m["text"]).name) if what == "picture" else m["text"] for m in mistakes]
        page.table(("truth", "answer", "probability", what), [(m["truth"], m["answer"], m["probability"], s) for m, s in zip(mistakes, shows, strict=True)])
    if observed.get("samples"):
        page.section("Samples", "What the model writes to evaluation rows, greedily.")
        page.table(("given", "the model's answer", "the row's own"), [(s["prompt"], s["answer"], s["truth"]) for s in observed["samples"][:MOST_ROWS]])


def per_class(labels: list[str], counts: list[list[int]]) -> list[tuple[str, float | None, float | None, float, int]]:
    """(class, precision, recall, F1, examples) from counts[truth][answer]; None where there is nothing to divide by."""
    said = [sum(column) for column in zip(*counts, strict=True)]
    return [_of_counts(n, row[i], said[i] - row[i], sum(row) - row[i]) for i, (n, row) in enumerate(zip(labels, counts, strict=True))]


def _of_counts(name: str, hit: int, false: int, missed: int) -> tuple[str, float | None, float | None, float, int]:
    said, true = hit + false, hit + missed
    return name, hit / said if said else None, hit / true if true else None, 2 * hit / (said + true) if said + true else 0.0, true


def _parameters(page: Page, result: dict[str, Any], plan: Any) -> None:
    rows = result.get("parameters") or []
    if rows:
        page.section("Parameters", f"{result['trainable']:,} numbers were trained.")
        page.table(
            ("method", "role", "sites", "parameters", "share of the base"),
            [(r["method"], r["role"] or "-", r["sites"], r["parameters"], (r["share"], f"{100 * r['share']:.4f}%")) for r in rows],
        )
    if plan:
        page.section("Plan")
        page.code(as_yaml(plan))


def _repeat(page: Page, run: dict[str, Any], result: dict[str, Any], where: str) -> None:
    versions = run.get("versions") or {}
    page.section("How to repeat it")
    # +cpu and the like name a build, which the package index does not have
    packages = " ".join(f"{k}=={v.partition('+')[0]}" for k, v in versions.items())
    page.code(f"pip install {packages}\nveneer train {where}/{CONFIG} output={where}-again")
    page.text("The same versions on the same hardware give the same numbers; other hardware may round otherwise. Paths are relative to where it ran.")
    page.section("Configuration")
    page.code(as_yaml(run["config"]))
    facts = {**versions, **(result.get("hardware") or {})}
    page.section("Versions and hardware")
    page.facts({k: shown(v) for k, v in facts.items()})


def as_yaml(data: Any) -> str:
    """`data` as YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
