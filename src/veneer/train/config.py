"""The configuration of a run: strict, from YAML and `key=value`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, did_you_mean


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataConfig(Strict):
    """Where examples come from. `train` and `eval` are files, datasets of the hub, or 'tweets' (the demo's)."""

    train: str
    eval: str | None = Field(None, description="default: a share of the training rows, `eval_rows` or a tenth")
    text: str | None = None
    label: str | None = None
    encoding: str = "utf-8"
    limit: int | None = Field(None, ge=1, description="train on that many rows, drawn with the seed")
    eval_rows: int | None = Field(None, ge=1)


class TrainConfig(Strict):
    """A run. `plan` is a preset's name or what vn.Plan.from_dict takes; a classifier's head is added to it."""

    model: str
    data: DataConfig
    plan: Any = "lora"
    task: Literal["text-classification", "causal-lm"] = "text-classification"
    output: str = "runs/train"
    name: str = "adapter"
    seed: int = 0
    epochs: float = Field(3.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(16, ge=1)
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="default: by method, see train/rates.py")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_length: int = Field(128, ge=2)
    checkpoint_every: int | None = Field(None, ge=1, description="steps; default: once an epoch")
    keep_checkpoints: int = Field(2, ge=1)
    choose_best: bool = Field(True, description="evaluate at each checkpoint and keep the best; otherwise the last is kept")
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: list[str] = []
    resume: bool = True


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration in the YAML file `path`, changed by `key=value` (dots reach into mappings).

    Raises: ConfigError for a file that cannot be read, an unknown key (naming the nearest), or a value out of range.
    """
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), fix="Give the path of a YAML configuration; examples/ has some") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"not YAML: {e}", where=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError(f"a configuration is a mapping, not {type(data).__name__}", where=str(path))
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not key=value", fix="For example learning_rate=1e-3 or data.limit=500")
        target = data
        *outer, last = str(key).split(".")
        for name in outer:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{name!r} holds no keys", where=item)
        try:
            target[last] = _number(yaml.safe_load(value))
        except yaml.YAMLError as e:
            raise ConfigError(f"{value!r} is not a YAML value: {e}", where=key) from None
    return make_config(data, str(path))


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def make_config(data: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """`data` checked. Raises: ConfigError."""
    if isinstance(data.get("learning_rate"), str):
        data = {**data, "learning_rate": _number(data["learning_rate"])}
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = DataConfig.model_fields if len(first["loc"]) > 1 else TrainConfig.model_fields
            raise ConfigError(f"there is no key {place!r}", where=where, fix=did_you_mean(place.rpartition(".")[2], fields)) from None
        raise ConfigError(f"{place}: {first['msg'].lower()}, not {first.get('input')!r}"[:300], where=where) from None
