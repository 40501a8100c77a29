"""The configuration of `veneer select`: that of a training run, with a section `select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..errors import ConfigError, did_you_mean
from ..train.config import Strict, TrainConfig, make_config, override, read_yaml

SECTION = "select"


class SelectSection(Strict):
    """What is searched, and within what. All else in the file is the training of each candidate, and then of the chosen."""

    space: Any = Field("default", description="'default', 'autopeft', 'singles', a list of plans, or parts with choices")
    budget: dict[str, Any] = Field({}, description="params, latency, memory, minutes, trials")
    objectives: list[str] = ["score", "parameters", "latency", "memory", "seconds"]
    metric: str | None = Field(None, description="accuracy, macro_f1 or loss; default: accuracy where there are classes")
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    halving: bool = Field(True, description="train candidates a little first, and only the better ones further")
    finalists: int = Field(1, description="of each generation of nine so many are trained in full at least")
    executor: Literal["local", "race", "ray"] = "local"
    graph: bool = Field(False, description="of a race on a GPU: record a training step as a CUDA graph")


def load(path: str | Path, overrides: list[str] | None = None) -> tuple[TrainConfig, SelectSection]:
    """The training configuration and the section `select` of the YAML file `path`, changed by `key=value`.

    Raises: ConfigError for a file that cannot be read, an unknown key (naming the nearest), a value out of range, and a `plan`,
    which is what is looked for.
    """
    data = override(read_yaml(path), overrides or [])
    section = data.pop(SECTION, {})
    for key in ("plan", "learning_rate"):
        if key in data:
            raise ConfigError(f"{key!r} is what a selection finds", where=str(path), fix="Put plans to choose among under select.space, as a list")
    return make_config(data, str(path)), make_section(section, str(path))


def make_section(data: Any, where: str) -> SelectSection:
    """`data` checked. Raises: ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"{SECTION!r} is a mapping, not {type(data).__name__}", where=where, fix="For example select: {budget: {params: 0.1%}}")
    try:
        return SelectSection.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"there is no key 'select.{place}'", where=where, fix=did_you_mean(place, SelectSection.model_fields)) from None
        raise ConfigError(f"select.{place}: {first['msg'].lower()}, not {first.get('input')!r}"[:300], where=where) from None
