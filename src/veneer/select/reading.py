"""Reading a space: strict, with errors that name the place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, PlanError, did_you_mean
from ..methods import find
from ..plan import Gated, Plan, finite, short
from .part import PartSpace, forms

KEYS = ("parts", "plans", "together", "layers", "gated", "rates")


def read(data: Any, where: str) -> dict[str, Any]:
    """The fields of the Space that the mapping `data` describes. Raises: ConfigError, PlanError."""
    if not isinstance(data, dict):
        raise ConfigError(f"a space is a name, a list of plans or a mapping, not {short(data)}", where=where)
    for key in data:
        if key not in KEYS:
            raise ConfigError(f"a space has no key {short(key)}", where=where, fix=did_you_mean(str(key), KEYS))
    if ("parts" in data) == ("plans" in data):
        raise ConfigError("a space has either 'parts' or 'plans'", where=where, fix="parts: methods with choices; plans: a list of plans")
    space: dict[str, Any] = {}
    if "plans" in data:
        for key in ("together", "layers", "gated"):
            if key in data:
                raise ConfigError(f"{key!r} is for a space of parts", where=where, fix="Leave it out, or write parts in place of plans")
        if not isinstance(data["plans"], list):
            raise ConfigError(f"'plans' is a list, not {short(data['plans'])}", where=where)
        space["plans"] = [Plan.from_dict(p, f"{where}.plans[{i}]") for i, p in enumerate(data["plans"])]
    else:
        if not isinstance(data["parts"], list):
            raise ConfigError(f"'parts' is a list of methods with choices, not {short(data['parts'])}", where=where)
        parts: list[PartSpace] = []
        space["parts"] = parts
        for i, p in enumerate(data["parts"]):
            parts.append(_part(p, f"{where}.parts[{i}]", [q.name for q in parts]))
    space["together"] = _word(data.get("together", "any"), ("any", "one"), f"{where}.together")
    space["layers"] = _layers(data.get("layers", "all"), f"{where}.layers")
    space["gates"] = _gates(data.get("gated", False), f"{where}.gated")
    space["rates"] = _rates(data.get("rates", [1.0]), f"{where}.rates")
    return space


def _part(data: Any, where: str, taken: list[str]) -> PartSpace:
    if isinstance(data, str):
        data = {"method": data}
    if not isinstance(data, dict) or "method" not in data:
        raise ConfigError(f"a part is a mapping with 'method' and options, not {short(data)}", where=where, fix="For example {method: lora, r: [0, 4, 8]}")
    method = find(data["method"], where)
    optional = data.get("optional", False)
    if not isinstance(optional, bool):
        raise ConfigError(f"optional is true or false, not {short(optional)}", where=where)
    known = [f.name for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    fixed, choices = {}, {}
    for key, value in data.items():
        if key in ("method", "optional"):
            continue
        if key not in known:
            raise PlanError(f"{method.name} has no option {short(key)}", where=where, fix=did_you_mean(str(key), known))
        if isinstance(value, list):
            if not value:
                raise ConfigError(f"{key} has no choices", where=where, fix="Give at least one")
            choices[key] = list(dict.fromkeys(value)) if all(v is None or isinstance(v, (int, float, str)) for v in value) else value
        else:
            fixed[key] = value
    name = method.name
    while name in taken:
        name = f"{method.name}{int(name.removeprefix(method.name) or 1) + 1}"
    part = PartSpace(name, method, fixed, choices, optional)
    for key, value in part.choices.items():
        if key in part.switches and len(value) == 1:
            raise ConfigError(f"{key} is always 0, so {name} is never on", where=where, fix="Give other sizes too, or take the part out")
    try:
        for form in forms(part):
            del form
    except PlanError as e:
        raise e if e.where != f"space.{name}" else PlanError(e.what, where=where, fix=e.fix) from None
    return part


def _word(value: Any, known: Sequence[str], where: str) -> str:
    if value not in known:
        raise ConfigError(f"{short(value)} is not one of {', '.join(known)}", where=where, fix=did_you_mean(str(value), known))
    return value


def _layers(value: Any, where: str) -> str | list[str]:
    if isinstance(value, list):
        if not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise ConfigError(f"slices are texts, as ':' and '6:', not {short(value)}", where=where)
        return value
    return _word(value, ("all", "each"), where)


def _gates(value: Any, where: str) -> list[str | None]:
    out: list[str | None] = []
    for v in value if isinstance(value, list) else [value]:
        per = {False: None, True: Gated.per}.get(v, v) if isinstance(v, bool) else _word(v, ("example", "token", "constant"), where)
        if per not in out:
            out.append(per)
    if not out:
        raise ConfigError("gated has no choices", where=where, fix="For example [false, true]")
    return out


def _rates(value: Any, where: str) -> list[float]:
    out = list(value) if isinstance(value, list) else [value]
    if not out or not all(finite(v) and v > 0 for v in out):
        raise ConfigError(f"rates are positive factors of the default learning rate, not {short(value)}", where=where, fix="For example [1, 3]")
    return [float(v) for v in dict.fromkeys(out)]
