"""The table of evidence.py's lines, and what became of the claims."""

from __future__ import annotations

import statistics
from typing import Any

from plans import FOLDED, HEAD, LIGHT, METHODS, OURS, ROWS, SETTLED, SINGLE, VARIANTS

RUNGS = ((1 / 8, 4), (1 / 4, 2))  # of race(halving=2, finalists=2) with eight candidates
Cells = dict[tuple[str, int, int], dict[str, dict[str, Any]]]


def select(rows: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """The plan that successive halving over the light plans ends with, by dev scores, and its cost in runs of one."""
    steps = rows[LIGHT[0]]["steps"]
    alive, cost, at = list(LIGHT), 0.0, 0.0

    def score(m: str, share: float) -> float:
        return max((s for step, s in rows[m]["scores"] if step <= share * steps + 0.5), default=-1.0)

    for share, left in RUNGS:
        cost += len(alive) * (share - at)
        at = share
        alive = sorted(alive, key=lambda m: score(m, share), reverse=True)[:left]
    return max(alive, key=lambda m: score(m, 1.0)), cost + len(alive) * (1 - at)


def cells_of(lines: list[dict[str, Any]], setting: str) -> Cells:
    cells: Cells = {}
    for x in lines:
        if x["kind"] == "cell" and x["setting"] == setting:
            cells.setdefault((x["task"], x["K"], x["seed"]), {}).setdefault(x["row"], x)  # a row may be run again for another that needs it
    return {key: rows for key, rows in cells.items() if all(m in rows for m in (*METHODS, "settled"))}


class Table:
    """Means over seeds, tasks and sizes."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.tasks = list(dict.fromkeys(t for t, _, _ in cells))
        self.sizes = sorted({k for _, k, _ in cells})

    def values(self, row: str, k: int, task: str) -> list[float]:
        return [100 * rows[row]["accuracy"] for (t, kk, _), rows in sorted(self.cells.items()) if t == task and kk == k and row in rows]

    def mean(self, row: str, k: int) -> float:
        return statistics.mean(statistics.mean(v) for t in self.tasks if (v := self.values(row, k, t)))

    def pairs(self, a: str, b: str, sizes: list[int]) -> list[float]:
        """By how much row `a` is ahead of row `b`, in each cell that has both."""
        return [100 * (rows[a]["accuracy"] - rows[b]["accuracy"]) for (_, k, _), rows in self.cells.items() if k in sizes and a in rows and b in rows]

    def error(self, a: str, b: str, sizes: list[int]) -> float:
        """Standard error of the mean difference of two rows, paired by cell."""
        d = self.pairs(a, b, sizes)
        return statistics.stdev(d) / len(d) ** 0.5 if len(d) > 1 else float("nan")

    def best_of_each(self, rows: tuple[str, ...], k: int) -> float:
        return statistics.mean(max(statistics.mean(self.values(m, k, t)) for m in rows) for t in self.tasks)

    def over(self, what: Any, sizes: list[int]) -> float:
        return statistics.mean(what(k) for k in sizes)

    def unseen(self, sizes: list[int]) -> list[float]:
        """By how much 'selected' is ahead of the light plan that was best for the task on the other seeds, cell by cell: a hindsight
        that the cell's own test rows had no part in."""
        out = []
        for (task, k, seed), rows in self.cells.items():
            others = [r for (t, kk, s), r in self.cells.items() if (t, kk) == (task, k) and s != seed]
            if k in sizes and others:
                best = max(LIGHT, key=lambda m, o=others: sum(r[m]["accuracy"] for r in o))
                out.append(100 * (rows["selected"]["accuracy"] - rows[best]["accuracy"]))
        return out

    def table(self, k: int) -> list[str]:
        out = [f"### K = {k}", "", "| | " + " | ".join(self.tasks) + " | mean | trained |", "|---|" + "---|" * (len(self.tasks) + 2)]
        for row in ROWS:
            if not any(row in rows for (_, kk, _), rows in self.cells.items() if kk == k):
                continue
            shown = []
            for t in self.tasks:
                v = self.values(row, k, t)
                shown.append("-" if not v else f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" if len(v) > 1 else f"{v[0]:.1f}")
            count = statistics.mean(rows[row]["parameters"] for (_, kk, _), rows in self.cells.items() if kk == k and row in rows)
            mean = "-" if "-" in shown else f"{self.mean(row, k):.1f}"  # of fewer tasks it would not compare
            out.append(f"| {row} | " + " | ".join(shown) + f" | {mean} | {count:,.0f} |")
        return [*out, ""]


def overall(t: Table) -> list[str]:
    """The mean of each row that every cell has, over tasks, sizes and seeds."""
    whole = [row for row in ROWS if all(row in rows for rows in t.cells.values())]
    shown = [f"{t.over(lambda k, r=row: t.mean(r, k), t.sizes):.1f}" for row in whole]
    return ["### All sizes", "", "| " + " | ".join(whole) + " |", "|---" * len(whole) + "|", "| " + " | ".join(shown) + " |", ""]


def claims(t: Table, costs: list[float]) -> list[str]:
    out = ["| claim | " + " | ".join(f"K = {k}" for k in t.sizes) + " | all | |", "|---|" + "---|" * (len(t.sizes) + 2)]
    groups = [[k] for k in t.sizes] + [t.sizes]

    def line(text: str, value: Any, holds: Any, rows: tuple[str, str] | None = None) -> None:
        found = [value(ks) for ks in groups]
        shown = [f"{v:+.2f}" + (f" ± {t.error(*rows, ks):.2f}" if rows else "") for v, ks in zip(found, groups, strict=True)]
        verdict = "" if holds is None else "holds" if all(map(holds, found)) else "holds over all" if holds(found[-1]) else "fails"
        out.append(f"| {text} | " + " | ".join(shown) + f" | {verdict} |")

    best = max(SINGLE, key=lambda m: t.over(lambda k: t.mean(m, k), t.sizes))
    for row in (OURS, "unipelt-apl", "unipelt-ap"):
        line(f"{row} less the best single method on average ({best})", lambda ks, r=row: t.over(lambda k: t.mean(r, k) - t.mean(best, k), ks),
             lambda v: v >= 0, (row, best))  # fmt: skip
    line(f"{OURS} less the best single method at that K", lambda ks: t.over(lambda k: t.mean(OURS, k) - max(t.mean(m, k) for m in SINGLE), ks), None)
    line(f"{OURS} less the best single method of each task", lambda ks: t.over(lambda k: t.mean(OURS, k) - t.best_of_each(SINGLE, k), ks), None)
    line(f"{OURS} less full fine-tuning", lambda ks: t.over(lambda k: t.mean(OURS, k) - t.mean("full", k), ks), None, (OURS, "full"))
    for row, whole in [*SETTLED.items(), *((row, way[0]) for row, way in VARIANTS.items())]:
        there = [r for rows in t.cells.values() if (r := rows.get(row))]
        if not all(t.pairs(row, whole, ks) for ks in groups):
            continue
        share = statistics.mean((r["parameters"] - r["head"]) / (r["before"] - r["head"]) for r in there)
        cells = "" if len(there) == len(t.cells) else f" ({len(there)} cells)"
        line(f"{row} less {whole}, at {share:.2f} of its parameters{cells}", lambda ks, r=row, w=whole: statistics.mean(t.pairs(r, w, ks)),
             lambda v, s=share: v >= -0.3 and s <= 0.5, (row, whole))  # fmt: skip
    for row in (r for r, way in VARIANTS.items() if way[0] == SETTLED["settled"]):
        if all(t.pairs(row, "settled", ks) for ks in groups):
            line(f"{row} less settled, in the cells that have both", lambda ks, r=row: statistics.mean(t.pairs(r, "settled", ks)), None, (row, "settled"))
    for row, twin in FOLDED.items():
        if all(row in rows for rows in t.cells.values()):
            line(f"{row} less {twin}", lambda ks, r=row, w=twin: t.over(lambda k: t.mean(r, k) - t.mean(w, k), ks), None, (row, twin))
    cost = statistics.mean(costs)
    line(f"selected less the best plan of each task in hindsight, at {cost:.2f} runs' cost",
         lambda ks: t.over(lambda k: t.mean("selected", k) - t.best_of_each(LIGHT, k), ks), lambda v: v >= -0.3)  # fmt: skip
    if all(t.unseen([k]) for k in t.sizes):
        line("selected less the plan of each task that was best on the other seeds", lambda ks: statistics.mean(t.unseen(ks)), None)
    fixed = max(LIGHT, key=lambda m: t.over(lambda k: t.mean(m, k), t.sizes))
    line(f"selected less the best plan for all tasks in hindsight ({fixed})", lambda ks: t.over(lambda k: t.mean("selected", k) - t.mean(fixed, k), ks),
         None, ("selected", fixed))  # fmt: skip
    return [*out, ""]


def parts(cells: Cells, row: str) -> list[str]:
    """What the gates and the ablation say of the parts, as `row` was settled."""
    groups: dict[tuple[str, str], list[Any]] = {}
    each = []
    for rows in cells.values():
        own = rows[row]["parts"] if row in rows else []
        for method, module, _, numbers, mean, loss, kept in own:
            groups.setdefault((method, module), []).append((numbers, mean, loss, kept))
        gate, loss = [p[4] for p in own], [p[5] for p in own]
        if len(set(gate)) > 1 and len(set(loss)) > 1:
            each.append(statistics.correlation(ranks(gate), ranks(loss)))
    if not groups:
        return []
    out = [f"| part of {OURS}, {row} | numbers in a group | mean gate | dev nats lost without a group | kept |", "|---|---|---|---|---|"]
    for (method, module), v in groups.items():
        numbers, mean, loss, kept = (statistics.mean(x) for x in zip(*v, strict=True))
        out.append(f"| {method} {module} | {numbers:,.0f} | {mean:.3f} | {loss:+.4f} | {100 * kept:.0f}% |")
    error = f" ± {statistics.stdev(each) / len(each) ** 0.5:.2f}" if len(each) > 1 else ""
    shown = f"{statistics.mean(each):+.2f}{error} (mean of {len(each)} cells)" if each else "all gates or losses are alike"
    return [*out, "", f"Rank correlation, within a cell, of a part's gate with what its removal costs: {shown}", ""]


def again(lines: list[dict[str, Any]], setting: str) -> list[str]:
    """By how much rows that were run twice, from the same start, moved: the noise of one training."""
    first: dict[tuple[Any, ...], float] = {}
    moved: dict[str, list[float]] = {}
    for x in lines:
        if x["kind"] == "cell" and x["setting"] == setting:
            key = x["task"], x["K"], x["seed"], x["row"]
            if key in first:
                moved.setdefault(x["row"], []).append(100 * abs(x["accuracy"] - first[key]))
            first.setdefault(key, x["accuracy"])
    shown = ", ".join(f"{row} {statistics.mean(v):.1f} (at most {max(v):.1f}, {len(v)} cells)" for row, v in moved.items())
    return [f"Run a second time, a row's accuracy moved on average by: {shown}", ""] if moved else []


def ranks(values: list[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def report(lines: list[dict[str, Any]], setting: str) -> str:
    cells = cells_of(lines, setting)
    others = {x["setting"] for x in lines if x["kind"] == "cell"} - {setting}
    left = f" Lines of other settings ({', '.join(sorted(others))}) are left out." if others else ""
    failed = sum(x["kind"] == "error" for x in lines)
    left += f" {failed} cells ended in an error, which the lines say." if failed else ""
    if not cells:
        return f"no cell of setting {setting} is finished.{left}"
    picks: dict[str, int] = {}
    costs = []
    for rows in cells.values():
        pick, cost = select(rows)
        rows["selected"] = rows[pick] | {"row": "selected"}
        picks[pick] = picks.get(pick, 0) + 1
        costs.append(cost)
    t = Table(cells)
    seconds = sum(rows["full"]["cell_seconds"] for rows in cells.values())
    out = [
        f"Test accuracy, mean ± standard deviation over {len({s for *_, s in cells})} seeds; {len(cells)} cells, {seconds / len(cells):.0f} s of a process "
        f"each.{left}", "",
    ]  # fmt: skip
    rates = {m: rows[m]["lr"] for rows in cells.values() for m in METHODS}
    for k in t.sizes:
        out += t.table(k)
    out += overall(t)
    out += ["### The claims", "", *claims(t, costs)]
    out += ["Rates: " + ", ".join(f"{m} {lr:g}" for m, lr in rates.items()) + f"; of the fresh head {HEAD:g}", ""]
    out += ["Picked: " + ", ".join(f"{m} {n}" for m, n in sorted(picks.items(), key=lambda x: -x[1])), ""]
    for row in ("settled", "by-role"):
        out += parts(cells, row)
    out += again(lines, setting)
    return "\n".join(out)
