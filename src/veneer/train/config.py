"""The configuration of a run: strict, from YAML and `key=value`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import ConfigError, did_you_mean

VERSION, TASKS = 1, "tasks"
TaskName = Literal[
    "text-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "causal-lm",
    "masked-lm",
    "chat",
    "text-to-text",
    "dpo",
    "image-classification",
    "audio-classification",
    "sentence-embedding",
    "choice",
    "text-to-choice",
]
Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "torchao-fp8"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataConfig(Strict):
    """Where examples come from: files (csv, tsv, json, jsonl, parquet, txt), folders, datasets of the hub, or 'tweets'
    (the demo's)."""

    train: str
    eval: str | None = Field(None, description="default: a share of the training rows, `eval_rows` or a tenth")
    format: str | None = Field(None, description="default: found from the columns; docs/data.md lists them")
    columns: dict[str, str] = Field({}, description="field: column, where the usual names are not used")
    text: str | None = Field(None, description="short for columns.text")
    label: str | None = Field(None, description="short for columns.label")
    encoding: str = Field("utf-8", description="a file's own byte-order mark goes before it")
    quotes: bool = Field(True, description="csv, tsv: fields may stand in quotes; false: a quote is a letter")
    split: str = Field("train", description="of a dataset")
    eval_split: str = Field("test", description="of the dataset `eval`")
    subset: str | None = Field(None, description="a dataset's configuration")
    limit: int | None = Field(None, ge=1, description="train on that many rows, drawn with the seed")
    eval_rows: int | None = Field(None, ge=1)
    workers: int = Field(0, ge=0, description="processes that open pictures and sounds beside the one that trains")
    on_error: Literal["stop", "skip"] = Field("stop", description="skip: leave bad rows out and count them")


class TrainConfig(Strict):
    """A run. `plan` is a preset's name or what vn.Plan.from_dict takes; a new head is added to it."""

    version: int = Field(VERSION, description="of this file's form")
    model: str
    data: DataConfig
    plan: Any = "lora"
    adapters: dict[str, str] = Field({}, description="trained adapters (folders of runs) that the plan uses, by name: {use: NAME}")
    task: TaskName = "text-classification"
    output: str = "runs/train"
    name: str = "adapter"
    seed: int = Field(0, ge=0, lt=1 << 32)
    epochs: float = Field(3.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(16, ge=1, description="rows in memory at once; less where they do not fit, with more accumulation")
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="default: by method, see train/rates.py")
    head_learning_rate: float | None = Field(None, gt=0, description="of a head that is added to the plan; default: as all else")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_length: int = Field(128, ge=2, description="tokens; what is longer is cut, and counted")
    max_seconds: float = Field(30.0, gt=0, description="of a sound", json_schema_extra={TASKS: ["audio-classification"]})
    chat_template: str | None = Field(None, description="a file, or chatml; default: the tokenizer's own", json_schema_extra={TASKS: ["chat", "dpo"]})
    loss_on: Literal["answers", "all"] = Field(
        "answers", description="answers: what the assistant says, or the completion", json_schema_extra={TASKS: ["causal-lm", "chat"]}
    )
    packing: bool = Field(False, description="several sequences in one row, kept apart")
    beta: float = Field(0.1, gt=0, description="dpo: how far the base holds the model", json_schema_extra={TASKS: ["dpo"]})
    checkpoint_every: int | None = Field(None, ge=1, description="steps; default: once an epoch")
    keep_checkpoints: int = Field(2, ge=1)
    choose_best: bool = Field(True, description="evaluate at each checkpoint and keep the best; otherwise the last is kept")
    best_metric: str | None = Field(None, description="what the best is chosen by; default: by task, see docs/training.md")
    eval_generate: bool | Annotated[int, Field(ge=1)] = Field(
        False, description="tasks that answer in text: at each evaluation write answers to that many of its rows (true: 32), and score them"
    )
    max_new_tokens: int = Field(64, ge=1, description="of an answer that is written in an evaluation")
    early_stopping: int | None = Field(None, ge=1, description="stop after that many evaluations without a better one")
    stop_on_spike: float | None = Field(3.0, gt=1, description="stop where the loss is that many times what it was at worst so far")
    bf16: bool = False
    gradient_checkpointing: bool | Literal["auto"] = Field("auto", description="auto: where the estimate does not fit the memory")
    quantization: Quantization | None = Field(None, description="of the base")
    report_to: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    resume: bool = True


def meant_for() -> dict[str, list[str]]:
    """The keys that some tasks alone have a use for, each with those; the schema says it too."""
    extras = ((name, field.json_schema_extra) for name, field in TrainConfig.model_fields.items())
    return {name: list(extra[TASKS]) for name, extra in extras if isinstance(extra, dict) and isinstance(extra.get(TASKS), list)}  # type: ignore[arg-type]


# keys of other trainers that mean one of these
ALIASES = {
    "lr": "learning_rate", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation", "output_dir": "output", "base_model": "model", "model_name_or_path": "model",
    "adapter": "plan", "max_seq_length": "max_length", "sequence_len": "max_length", "sample_packing": "packing", "load_in_4bit": "quantization",
    "load_in_8bit": "quantization", "warmup_ratio": "warmup", "save_steps": "checkpoint_every", "datasets": "data",
    "metric_for_best_model": "best_metric", "predict_with_generate": "eval_generate", "generation_max_length": "max_new_tokens",
    "load_best_model_at_end": "choose_best",
}  # fmt: skip


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration in the YAML file `path`, changed by `key=value` (dots reach into mappings).

    Raises: ConfigError for a file that cannot be read, an unknown key (naming the nearest), or a value out of range.
    """
    return make_config(override(read_yaml(path), overrides or []), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`. Raises: ConfigError."""
    import yaml

    path = Path(path)
    try:
        raw = path.read_bytes()
        # JSON's escapes of what lies beyond 16 bits are none of YAML's
        data = json.loads(raw) if path.suffix.lower() == ".json" else yaml.load(raw, _once())
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), fix="Give the path of a YAML configuration; examples/ has some") from None
    except IsADirectoryError:
        raise ConfigError("this is a folder", where=str(path), fix="Give the path of a YAML configuration") from None
    except OSError as e:
        raise ConfigError(f"cannot be read: {e.strerror or e}", where=str(path)) from None
    except (yaml.YAMLError, ValueError) as e:  # JSON's errors and those of encodings are ValueErrors
        raise ConfigError(f"not {'JSON' if path.suffix.lower() == '.json' else 'YAML'}: {' '.join(str(e).split())}", where=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError(f"a configuration is a mapping, not {type(data).__name__}", where=str(path))
    return data


def _once() -> Any:
    """YAML's safe loader, for which a key that stands twice is an error: the later one would win without a word."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else id(key))
            return super().construct_mapping(node, deep)

    return Once


def override(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`data` with each `key=value` set in it; dots reach into mappings, values are YAML. Raises: ConfigError."""
    import yaml

    for item in overrides:
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
            raise ConfigError(f"{value!r} is not a YAML value: {' '.join(str(e).split())}", where=key) from None
    return data


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
    for key in ("learning_rate", "head_learning_rate"):
        if isinstance(data.get(key), str):
            data = {**data, key: _number(data[key])}
    version = data.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        which = "an old" if isinstance(version, int) and version < VERSION else "another"
        raise ConfigError(
            f"this is {which} form of configuration: version {version!r}, and {VERSION} is read",
            where=where,
            fix="`veneer init` writes one of today's; keys that are no more are then named one by one",
        )
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        last = place.rpartition(".")[2]
        if first["type"] == "extra_forbidden":
            fields = DataConfig.model_fields if len(first["loc"]) > 1 else TrainConfig.model_fields
            fix = f"It is called {ALIASES[last]!r} here" if ALIASES.get(last) in fields else did_you_mean(last, fields)
            raise ConfigError(f"there is no key {place!r}", where=where, fix=fix) from None
        if first["type"] == "model_type":
            raise ConfigError(f"{place} holds keys of its own, and this is {first.get('input')!r}", where=where, fix=f"For example {place}.train=…") from None
        if first["type"] == "missing":
            raise ConfigError(f"the key {place!r} is missing", where=where, fix=f"Give it, as {place}=…") from None
        if first["type"] == "literal_error":
            options = [str(o).strip("' ") for o in str(first.get("ctx", {}).get("expected", "")).replace(" or ", ",").split(",")]
            raise ConfigError(f"{place} cannot be {first.get('input')!r}", where=where, fix=did_you_mean(str(first.get("input")), options)) from None
        raise ConfigError(f"{place}: {first['msg'].lower()}, not {first.get('input')!r}"[:300], where=where) from None
