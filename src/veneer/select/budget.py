"""Budgets in the user's words: `params: 0.1%`, `latency: +0%`, `memory: 12GB`, `minutes: 30`, `trials: 40`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..plan import finite, short, whole

KEYS = ("params", "latency", "memory", "minutes", "trials")
COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"


@dataclass(frozen=True)
class Budget:
    """Limits; None where there is none.

    parameters  trainable numbers, of the plan with all that is trained besides, as a fresh head
    latency     seconds of inference over the base's: 1.0 for '+0%' (only what merges), 1.1 for '+10%'
    memory      bytes at the peak of a training step
    minutes     of the whole search
    trials      candidates
    words       what the user wrote
    """

    parameters: int | None = None
    latency: float | None = None
    memory: int | None = None
    minutes: float | None = None
    trials: int | None = None
    words: dict[str, Any] = field(default_factory=dict)

    @property
    def merged_only(self) -> bool:
        """Whether nothing may cost time at inference, so that every method has to merge into the base."""
        return self.latency is not None and self.latency <= 1.0

    def limits(self) -> dict[str, float]:
        """The limits that there are, by name."""
        own = {k: getattr(self, k) for k in ("parameters", "latency", "memory", "minutes", "trials")}
        return {k: v for k, v in own.items() if v is not None}


def parse(data: Any, total: int, where: str = "budget") -> Budget:
    """The budget that `data` (a mapping, or None for no limits) describes, on a base of `total` parameters.

    params   a share of the base's parameters, '0.1%', or a number: 50000, '50k', '1.2M'
    latency  more than the base's, '+0%' or '+10%': +0% takes only methods that declare that they merge; the rest is measured
    memory   '12GB', '800MB', '12GiB'
    minutes  a number, of wall clock, resumed runs together
    trials   a whole number

    Raises: ConfigError for anything else, with the form that is meant.
    """
    if data is None:
        return Budget()
    if isinstance(data, Budget):
        return data
    if not isinstance(data, dict):
        raise ConfigError(f"a budget is a mapping, not {short(data)}", where=where, fix="For example {params: 0.1%, minutes: 30}")
    for key in data:
        if key not in KEYS:
            raise ConfigError(f"a budget has no {short(key)}", where=where, fix=did_you_mean(str(key), KEYS))
    readers = {"params": lambda v, w: _params(v, w, total), "latency": _latency, "memory": _memory, "minutes": _minutes, "trials": _trials}
    found = {k: readers[k](v, f"{where}.{k}") for k, v in data.items() if v is not None}
    if "params" in found:
        found["parameters"] = found.pop("params")
    return Budget(**found, words={k: v for k, v in data.items() if v is not None})


def _params(value: Any, where: str, total: int) -> int:
    if isinstance(value, str) and (m := re.fullmatch(_NUMBER + r"\s*%", value.strip())):
        found = float(m[1]) / 100 * total
    elif isinstance(value, str) and (m := re.fullmatch(_NUMBER + r"\s*([kKmMbBgG]?)", value.strip().replace(",", ""))):
        found = float(m[1]) * COUNTS[m[2].lower()]
    elif isinstance(value, int) and finite(value):
        found = value
    else:
        raise ConfigError(f"{short(value)} is no number of parameters", where=where, fix="Write a share of the base, '0.1%', or a number, 50000 or '50k'")
    if not 1 <= found <= 1e15:
        raise ConfigError(f"{short(value)} is less than one parameter of this base's {total:,}", where=where, fix="Allow more")
    return int(found)


def _latency(value: Any, where: str) -> float:
    m = re.fullmatch(r"\+\s*" + _NUMBER + r"\s*%", value.strip()) if isinstance(value, str) else None
    if m is None:
        raise ConfigError(f"{short(value)} is no latency", where=where, fix="Write how much more than the base's: '+0%' (only what merges) or '+10%'")
    return 1 + float(m[1]) / 100


def _memory(value: Any, where: str) -> int:
    m = re.fullmatch(_NUMBER + r"\s*([kKmMgGtT]i?[bB])", value.strip()) if isinstance(value, str) else None
    if m is None or float(m[1]) == 0:
        raise ConfigError(f"{short(value)} is no amount of memory", where=where, fix="Write a number and a unit: '12GB', '800MB', '12GiB'")
    return int(float(m[1]) * BYTES[m[2].lower()])


def _minutes(value: Any, where: str) -> float:
    if not finite(value) or value <= 0:
        raise ConfigError(f"{short(value)} is no number of minutes", where=where, fix="Write a number above 0, as 30 or 0.5")
    return float(value)


def _trials(value: Any, where: str) -> int:
    if not whole(value):
        raise ConfigError(f"{short(value)} is no number of trials", where=where, fix="Write a whole number of at least 1, as 40")
    return value
