"""Runs that differ in one key alone, as seeds do, as one row: mean ± standard deviation."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, did_you_mean
from .compare import NOT_COMPARED, flat


def over(runs: Sequence[dict[str, Any]], key: str) -> tuple[list[str], list[list[Any]]]:
    """(heads, rows): for each set of finished runs that are alike but for the configuration's `key`, their number, the mean
    of every score with its standard deviation (of a sample: n - 1), trainable parameters and mean seconds.

    Raises: ConfigError for a key that no configuration has, and where no run has finished.
    """
    described = [dict(flat({k: v for k, v in r["run"]["config"].items() if k not in NOT_COMPARED})) | {"plan": repr(r["run"].get("plan"))} for r in runs]
    known = dict.fromkeys(k for d in described for k in d)
    if key not in known:
        raise ConfigError(f"no run has a key {key!r}", where="--over", fix=did_you_mean(key, known))
    groups: dict[str, list[dict[str, Any]]] = {}
    for run, d in zip(runs, described, strict=True):
        if run["run"].get("result"):
            groups.setdefault(repr(sorted((k, repr(v)) for k, v in d.items() if k != key)), []).append(run)
    if not groups:
        raise ConfigError("none of these runs has finished", where="--over", fix="Without --over they are shown as they are")
    results = {id(r): r["run"]["result"] for group in groups.values() for r in group}
    metrics = list(dict.fromkeys(m for result in results.values() for m in result["metrics"]))
    rows = []
    for group in groups.values():
        here = [results[id(r)] for r in group]
        cells = [_spread([h["metrics"][m] for h in here if m in h["metrics"]]) for m in metrics]
        seconds = statistics.mean(h["seconds"] for h in here)
        rows.append([_shared([r["name"] for r in group]), len(group), *cells, here[0]["trainable"], (seconds, f"{seconds:,.0f} s")])
    return ["runs", "number", *metrics, "parameters", "time"], rows


def _spread(values: list[float]) -> Any:
    if not values:
        return None
    mean = statistics.mean(values)
    return mean, f"{mean:.4f}\u00a0±\u00a0{statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def _shared(names: list[str]) -> str:
    """What the names begin with, all of the first where that is nothing."""
    return names[0] if len(names) == 1 else os.path.commonprefix(names).rstrip("-_./ ") or names[0]
