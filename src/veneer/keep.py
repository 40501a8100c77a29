"""What settling may keep: a number of groups, a share of the gated parameters, a latency."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import PlanError, did_you_mean
from .plan import finite, short, whole

FORMS = "Give a number of groups, as 2, a share of the parameters, as 0.5, or a latency, as 'latency:+0%'"
KEYS = ("parts", "share", "latency")


@dataclass(frozen=True)
class Keep:
    """Limits that all hold: at most `parts` groups, `share` of the gated parameters, and a call that takes (1 + latency) times
    what it takes without them, where what merges costs nothing."""

    parts: int | None = None
    share: float | None = None
    latency: float | None = None

    @staticmethod
    def parse(keep: Any) -> Keep:
        """From None, an int (parts), a float (share), 'latency:+5%', or a dict of parts, share and latency. Raises: PlanError."""
        if keep is None:
            return Keep()
        if isinstance(keep, int) and not isinstance(keep, bool):
            keep = {"parts": keep}
        elif isinstance(keep, float):
            keep = {"share": keep}
        elif isinstance(keep, str) and ":" in keep:
            key, _, value = keep.partition(":")
            keep = {key: value}
        if not isinstance(keep, dict) or not keep:
            raise PlanError(f"keep={short(keep)}", fix=FORMS)
        for key in keep:
            if key not in KEYS:
                raise PlanError(f"keep has no {short(key)}", fix=did_you_mean(str(key), KEYS) + f". {FORMS}")
        parts, share, latency = (keep.get(k) for k in KEYS)
        if "parts" in keep and not whole(parts):
            raise PlanError(f"keep={short(parts)}", fix=FORMS)
        if "share" in keep and not (isinstance(share, (int, float)) and finite(share) and 0 < share <= 1):
            raise PlanError(f"keep={short(share)}", fix=FORMS)
        return Keep(parts, share, _latency(latency) if "latency" in keep else None)


def _latency(value: Any) -> float:
    """0.05 from 0.05 and '+5%'."""
    found = re.fullmatch(r"\s*\+?\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    number = float(found[1]) / 100 if found else value
    if not isinstance(number, (int, float)) or not finite(number) or number < 0:
        raise PlanError(f"keep: a latency of {short(value)}", fix="Give what may be added to the base's, as '+0%' (only what merges) or '+5%'")
    return float(number)


def choose(rows: list[dict[str, Any]], keep: Keep, threshold: float, measure: Callable[[list[int]], float]) -> float | None:
    """Mark the rows that are kept; return the added latency that was measured, if one was asked for.

    Rows are taken by their worth (the measured loss, else the mean gate), or by their worth for each parameter, whichever
    keeps more worth: a knapsack's greedy answers (Dantzig 1957).

    measure   numbers of rows that do not merge -> the latency that they add, as a share

    Raises: PlanError where none would be kept; it says what the cheapest needs.
    """
    total = sum(r["parameters"] for r in rows)
    seen: list[float] = []

    def worth(i: int) -> float:
        return rows[i]["mean"] if rows[i]["loss"] is None else rows[i]["loss"]

    def fill(order: list[int]) -> tuple[list[int], float]:
        taken, used, slow, added = [], 0, [], 0.0
        for place, i in enumerate(order):
            r = rows[i]
            fits = r["mean"] >= threshold and (keep.parts is None or place < keep.parts)
            if keep.share is not None:
                fits = fits and used + r["parameters"] <= total * keep.share
            if fits and keep.latency is not None and not r["merges"]:
                now = measure([*slow, i]) if keep.latency > 0 else float("inf")
                seen.append(now)
                fits = now <= keep.latency
                slow, added = ([*slow, i], now) if fits else (slow, added)
            if fits:
                taken.append(i)
                used += r["parameters"]
        return taken, added

    orders = [sorted(range(len(rows)), key=lambda i: (worth(i), rows[i]["mean"]), reverse=True)]
    if keep.share is not None:
        orders.append(sorted(range(len(rows)), key=lambda i: worth(i) / max(1, rows[i]["parameters"]), reverse=True))
    taken, added = max(map(fill, orders), key=lambda found: sum(map(worth, found[0])))
    for i, r in enumerate(rows):
        r["kept"] = i in taken
    if not taken:
        facts = [
            f"the largest mean gate is {max(r['mean'] for r in rows):.3f}",
            f"the smallest group is {min(r['parameters'] for r in rows) / total:.3f} of the gated parameters",
        ]
        if seen:
            least = min(seen)
            if keep.latency == 0:
                least = min(measure([i]) for i, r in enumerate(rows) if not r["merges"])
            facts.append(f"the least latency that was measured is +{100 * max(0.0, least):.0f}%, since no method in reach merges")
        raise PlanError("nothing would be left", fix=f"Keep at least one group: {', '.join(facts)}")
    return added if keep.latency is not None else None
