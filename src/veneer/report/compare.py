"""Runs side by side: one table, and one page with their curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from . import charts
from .page import Page, shown
from .run import duration, log_of, read, scores_of, series

RUN = "run.json"
# the same in all runs that can be compared, or told elsewhere
NOT_COMPARED = ("output", "resume", "plan", "name")


def read_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What the folders' runs say, each as a dict: name, run (run.json) and log.

    Raises: ConfigError for fewer than one folder, or one that holds no run, naming the nearest that does.
    """
    if not folders:
        raise ConfigError("there is nothing to compare", fix="Give the folders of runs: veneer compare runs/a runs/b")
    out = []
    names = _short_names([str(Path(f)) for f in folders])
    for folder, name in zip(map(Path, folders), names, strict=True):
        run = read(folder / RUN) if folder.is_dir() else None
        if run is None:
            what = "this folder is not a run: it has no run.json" if folder.is_dir() else "there is no such folder"
            raise ConfigError(what, where=str(folder), fix=near_runs(folder))
        if not isinstance(run.get("config"), dict):
            raise ConfigError("run.json is not one of ours", where=str(folder))
        out.append({"name": name, "folder": str(folder), "run": run, "log": log_of(folder, run)})
    return out


def near_runs(folder: Path) -> str:
    """A sentence that names the runs in `folder`, or else the one whose name is nearest to it."""
    inside = _runs_in(folder)
    if inside:
        return f"It holds runs: {' '.join(inside[:6])}{' …' if len(inside) > 6 else ''}"
    root = next((p for p in folder.parents if p.is_dir()), Path())
    above = [str(p) for p in folder.parents if (p / RUN).is_file()][:1]
    beside = above or _runs_in(root) + [r for d in _folders(root)[:200] for r in _runs_in(d)]
    if not beside:
        return "Give the folder that `veneer train` or `veneer demo` wrote"
    by_path = {str(Path(r)): r for r in beside}
    close = nearest(str(folder), by_path, most=1) or [max(by_path, key=lambda p: os.path.getmtime(Path(p) / RUN))]
    return f"The nearest run is {close[0]}"


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _runs_in(folder: Path) -> list[str]:
    return [str(p) for p in _folders(folder) if (p / RUN).is_file()]


def _short_names(paths: list[str]) -> list[str]:
    """The paths without the folders that all share."""
    if len(paths) < 2:
        return paths
    shared = os.path.commonpath([os.path.abspath(p) for p in paths])
    return [os.path.relpath(os.path.abspath(p), shared) for p in paths]


def table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(heads, rows): each run's plan, scores on its evaluation rows, trainable parameters and their share, learning rate,
    seconds and state. A cell is a value, a pair (value, text), or None where the run does not say."""
    metrics = list(dict.fromkeys(m for r in runs for m in (r["run"].get("result") or {}).get("metrics", {})))
    heads = ["run", "plan", *metrics, "parameters", "share", "learning rate", "time", "tokens/s", "state"]
    rows = []
    for r in runs:
        result = r["run"].get("result") or {}
        seconds, share = result.get("seconds"), result.get("share")
        speed = next((e["train_tokens_per_second"] for e in reversed(r["log"]) if "train_tokens_per_second" in e), None)
        rate = r["run"]["config"].get("learning_rate") or max(series(r["log"], "learning_rate")[1], default=None)
        state = "finished" if result else f"at step {max((e.get('step', 0) for e in r['log']), default=0)}"
        rows.append(
            [
                r["name"], _plan(r["run"]), *(result.get("metrics", {}).get(m) for m in metrics), result.get("trainable"),
                share if share is None else (share, f"{100 * share:.3f}%"), rate, seconds if seconds is None else (seconds, f"{seconds:,.0f} s"), speed, state,
            ]
        )  # fmt: skip
    return heads, rows


def _plan(run: dict[str, Any]) -> str:
    from ..plan import Plan

    plan = run.get("plan") or run["config"].get("plan")
    return str(Plan.from_dict(plan)) if plan else "-"


def differences(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(heads, rows): the keys of the configurations in which the runs differ, one row a run."""
    found = [dict(flat({k: v for k, v in r["run"]["config"].items() if k not in NOT_COMPARED})) for r in runs]
    keys = list(dict.fromkeys(k for f in found for k in f))
    keys = [k for k in keys if len({repr(f.get(k)) for f in found}) > 1]
    return ["run", *keys], [[r["name"], *(f.get(k) for k in keys)] for r, f in zip(runs, found, strict=True)]


def flat(config: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """The keys of a configuration, dotted where they lie within others, with their values."""
    return [e for k, v in config.items() for e in (flat(v, f"{before}{k}.") if isinstance(v, dict) else [(before + k, v)])]


def drawn(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table for a terminal, of cells as `table` gives them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # what a user wrote is no markup

    out = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for i, head in enumerate(heads):
        out.add_column(Text(head.replace("_", " ")), justify="right" if i else "left", overflow="fold", min_width=5)
    for r in rows:
        out.add_row(*(Text(c[1] if isinstance(c, tuple) else shown(c)) for c in r))
    return out


def terminal(runs: Sequence[dict[str, Any]]) -> Any:
    """What fits a terminal: the table without plans, and under it each run's plan and where the configurations differ."""
    from rich.console import Group
    from rich.text import Text

    heads, rows = table(runs)
    kept = [i for i, h in enumerate(heads) if i and h not in ("plan", "tokens/s", "state")]
    names = [r[0] if r[-1] == "finished" else f"{r[0]} ({r[-1]})" for r in rows]
    out = drawn([heads[0], *(heads[i] for i in kept)], [[name, *(r[i] for i in kept)] for name, r in zip(names, rows, strict=True)])
    lines = [Text(f"{r[0]}: {r[1]}") for r in rows]
    keys, values = differences(runs)
    lines += [Text(f"{key}: {', '.join(f'{v[0]} {shown(v[i])}' for v in values)}") for i, key in enumerate(keys) if i]
    return Group(out, *lines)


def page(runs: Sequence[dict[str, Any]]) -> Page:
    """The table, the scores against the parameters, every curve of all runs in one chart, and where the configurations
    differ."""
    out = Page(f"{len(runs)} runs compared", ", ".join(dict.fromkeys(str(r["run"]["config"].get("model", "")) for r in runs)))
    out.section("Runs")
    out.table(*table(runs))
    finished = [r for r in runs if r["run"].get("result")]
    metrics = list(dict.fromkeys(m for r in finished for m in r["run"]["result"]["metrics"]))
    if finished:
        out.section("Scores and cost")
    for m in metrics:
        here = [r for r in finished if m in r["run"]["result"]["metrics"]]
        out.figure(_against(here, m), f"{_title(m)} against parameters")
    curves = {"loss": "Training loss", "eval_loss": "Evaluation loss"} | {f"eval_{n}": _title(n) for r in runs for n in scores_of(r["log"])}
    found = {key: {r["name"]: series(r["log"], key) for r in runs} for key in (*curves, "learning_rate")}
    found = {key: {n: s for n, s in lines.items() if s[0]} for key, lines in found.items()}
    if any(found.values()):
        out.section("Curves")
    for key, lines in found.items():
        if lines:
            title = curves.get(key, "Learning rate")
            out.figure(charts.curves(lines, y=title.lower()), title)
    heads, rows = differences(runs)
    if len(heads) > 1:
        out.section("Where the configurations differ")
        out.table(heads, [[c if isinstance(c, (int, float, str, type(None))) else str(c) for c in r] for r in rows])
    return out


def _title(name: str) -> str:
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def _against(runs: Sequence[dict[str, Any]], metric: str) -> Any:
    from .page import plotly

    figure = plotly().Figure()
    for i, r in enumerate(runs):
        result = r["run"]["result"]
        words = (
            f"{r['name']}\n{metric} {shown(result['metrics'][metric])}\n{result['trainable']:,} parameters, {duration(result['seconds'])}\n{_plan(r['run'])}"
        )
        figure.add_scatter(
            x=[result["trainable"]], y=[result["metrics"][metric]], mode="markers", name=charts.short(r["name"]), customdata=[words],
            marker={"size": 11, "color": charts.line(i)["color"], "symbol": ("circle", "diamond", "square", "cross")[i // len(charts.COLOURS) % 4]},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(charts.layout(x="trainable parameters", y=metric.replace("_", " "), series=len(runs)), hovermode="closest")
    charts.logarithmic(figure, [r["run"]["result"]["trainable"] for r in runs])
    return figure
