"""The table of evidence.py's lines, and what became of the claims."""

from __future__ import annotations

import statistics
from typing import Any

from evidence import LIGHT, METHODS, ROWS, SINGLE

RUNGS = ((1 / 8, 4), (1 / 4, 2), (1 / 2, 1))


def select(rows: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """The plan that successive halving over the light plans ends with, by dev scores, and its cost in runs of one."""
    steps = rows[LIGHT[0]]["steps"]
    alive, cost, at = list(LIGHT), 0.0, 0.0
    for share, left in RUNGS:
        cost += len(alive) * (share - at)
        at = share

        def score(m: str, share: float = share) -> float:
            return max((s for step, s in rows[m]["scores"] if step <= share * steps + 0.5), default=-1.0)

        alive = sorted(alive, key=score, reverse=True)[:left]
    return alive[0], cost + len(alive) * (1 - at)


def report(lines: list[dict[str, Any]]) -> str:
    cells: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for x in lines:
        if x["kind"] == "cell":
            cells.setdefault((x["task"], x["K"], x["seed"]), {})[x["row"]] = x
    cells = {key: rows for key, rows in cells.items() if all(m in rows for m in (*METHODS, "settled"))}
    if not cells:
        return "no cell is finished"
    picks: dict[str, int] = {}
    costs = []
    for rows in cells.values():
        pick, cost = select(rows)
        rows["selected"] = rows[pick] | {"row": "selected"}
        picks[pick] = picks.get(pick, 0) + 1
        costs.append(cost)
    tasks = list(dict.fromkeys(t for t, _, _ in cells))
    sizes = sorted({k for _, k, _ in cells})
    seeds = {s for _, _, s in cells}

    def values(row: str, k: int, task: str) -> list[float]:
        return [100 * rows[row]["accuracy"] for (t, kk, _), rows in sorted(cells.items()) if t == task and kk == k]

    def mean(row: str, k: int) -> float:
        return statistics.mean(statistics.mean(v) for t in tasks if (v := values(row, k, t)))

    out = [f"Test accuracy, mean ± standard deviation over {len(seeds)} seeds; {len(cells)} cells.", ""]
    for k in sizes:
        out += [f"### K = {k}", "", "| | " + " | ".join(tasks) + " | mean | trained |", "|---|" + "---|" * (len(tasks) + 2)]
        for row in ROWS:
            shown = []
            for t in tasks:
                v = values(row, k, t)
                shown.append("-" if not v else f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" if len(v) > 1 else f"{v[0]:.1f}")
            count = statistics.mean(rows[row]["parameters"] for (_, kk, _), rows in cells.items() if kk == k)
            out.append(f"| {row} | " + " | ".join(shown) + f" | {mean(row, k):.1f} | {count:,.0f} |")
        out.append("")
    out += ["### The claims", ""]
    for k in sizes:
        best = max(SINGLE, key=lambda m: mean(m, k))
        per_task = statistics.mean(max(statistics.mean(values(m, k, t)) for m in SINGLE) for t in tasks)
        for gated in ("unipelt-ap", "unipelt-apl"):
            d = mean(gated, k) - mean(best, k)
            full = mean(gated, k) - mean("full", k)
            out.append(
                f"- K={k}: {gated} against the best single method on average ({best}): {d:+.2f} points: {'holds' if d >= 0 else 'fails'}; "
                f"against the best single method of each task: {mean(gated, k) - per_task:+.2f}; against full: {full:+.2f}"
            )
        lost = mean("unipelt-apl", k) - mean("settled", k)
        here = [rows["settled"] for (_, kk, _), rows in cells.items() if kk == k]
        part = statistics.mean((x["parameters"] - x["head"]) / (x["before"] - x["head"]) for x in here)
        verdict = "holds" if lost <= 0.3 and part <= 0.5 else "fails"
        out.append(f"- K={k}: settled loses {lost:+.2f} points of unipelt-apl, at {part:.2f} of its parameters (head left out): {verdict}")
        hindsight = max(LIGHT, key=lambda m: mean(m, k))
        each = statistics.mean(max(statistics.mean(values(m, k, t)) for m in LIGHT) for t in tasks)
        gap = each - mean("selected", k)
        average = mean(hindsight, k) - mean("selected", k)
        out.append(
            f"- K={k}: selected is {gap:+.2f} points below the best plan of each task in hindsight, {average:+.2f} below the best plan on average "
            f"({hindsight}), at {statistics.mean(costs):.2f} runs' cost: {'holds' if gap <= 0.3 else 'fails'}"
        )
    out += ["", "Picked: " + ", ".join(f"{m} {n}" for m, n in sorted(picks.items(), key=lambda x: -x[1]))]
    gates: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for rows in cells.values():
        for p in rows["settled"]["parts"]:
            gates.setdefault((p["method"], p["module"]), []).append((p["mean"], p["loss"]))
    out += ["", "| part of unipelt-apl | mean gate | dev points lost without it |", "|---|---|---|"]
    for (method, module), v in gates.items():
        out.append(f"| {method} {module} | {statistics.mean(a for a, _ in v):.3f} | {100 * statistics.mean(b for _, b in v):+.2f} |")
    if len(gates) > 1:
        pairs = [(p["mean"], p["loss"]) for rows in cells.values() for p in rows["settled"]["parts"]]
        if len({a for a, _ in pairs}) > 1 and len({b for _, b in pairs}) > 1:
            out += ["", f"Correlation of a part's mean gate with what its removal costs: {statistics.correlation(*zip(*pairs, strict=True)):+.2f}"]
    return "\n".join(out)
