"""Before the first step: tables, base, plan, and rows as tensors. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, known
from ..attach import attach, detach, state_of
from ..compose.held import written_out
from ..data.builtin import model_path, table
from ..data.formats import FORMATS, BadRow
from ..data.packing import check_causal, check_packing, pack
from ..data.tables import Table
from ..errors import ConfigError, DataError, did_you_mean
from ..fingerprint import packed
from ..plan import Plan
from ..store import load
from .config import TrainConfig, meant_for
from .heads import heads, with_heads
from .quantize import quantization
from .tasks import find_task
from .tasks.base import Task
from .written import Written, best_of

CHUNK = 1000
# fields that one of two tables of a kind may lack; a score beside pairs is one, where a task does without
OPTIONAL = {"label"} | {f.name for fmt in FORMATS.values() for f in fmt.fields if f.optional}


@dataclass
class Encoded:
    """Rows as a task's collator takes them.

    data     a datasets.Dataset;  rows: of the table, which each is of (before packing)
    lengths  before they were cut, in `data`'s order (before packing);  cut: how many were
    skipped  (place, reason) of rows that could not be used, and of those that the table had skipped
    """

    data: Any
    rows: list[int]
    lengths: list[int]
    cut: int
    skipped: list[tuple[str, str]]


@dataclass
class Prepared:
    """All that a run needs before its first step; `tokenizer` is the task's processor, whatever it reads; `asked` is the
    plan without the head that was added to it; `written` what is generated at evaluations, if anything."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    plan: Plan
    adapter: Adapter
    asked: Plan
    train: Any
    evaluation: Any
    labels: list[str]
    task: Task = field(repr=False, default=None)  # type: ignore[assignment]
    tables: tuple[Table, Table] = field(repr=False, default=None)  # type: ignore[assignment]
    encoded: tuple[Encoded, Encoded] = field(repr=False, default=None)  # type: ignore[assignment]
    written: Written | None = field(repr=False, default=None)

    def __post_init__(self) -> None:
        best_of(self)
        if self.config.eval_generate:
            self.written = Written(self)

    def counts(self) -> dict[str, Any]:
        """What run.json says of the data: its format, rows, rows cut and skipped (with the first reasons)."""
        out: dict[str, Any] = {"format": self.tables[0].format}
        for name, encoded, source in zip(("train", "eval"), self.encoded, self.tables, strict=True):
            out[name] = {
                "source": source.source, "rows": len(encoded.rows), "cut": encoded.cut, "longest": max(encoded.lengths, default=0),
                "skipped": len(encoded.skipped), "reasons": [f"{why} [{place}]" for place, why in encoded.skipped[:5]],
            }  # fmt: skip
        return out


def tables(config: TrainConfig) -> tuple[Table, Table]:
    """The training and the evaluation rows. Raises: DataError, ConfigError."""
    d, task = config.data, find_task(config.task)(config)
    options = {
        "text": d.text, "label": d.label, "encoding": d.encoding, "formats": task.formats, "format": d.format, "columns": d.columns,
        "subset": d.subset, "on_error": d.on_error, "quotes": d.quotes,
    }  # fmt: skip
    whole = table(d.train, split=d.split, **options)
    if d.eval is None:
        held = d.eval_rows or max(1, len(whole) // 10)
        if len(whole) < 2 or held >= len(whole):
            raise DataError(
                f"there are {len(whole)} rows, too few to hold {held} back for evaluation", where=d.train, fix="Give data.eval, or a smaller data.eval_rows"
            )
        task.check(whole, whole)
        train, test = whole.split(min(d.limit or len(whole), len(whole) - held), held, config.seed)
        test = seen(task, train, test)
        task.check(train, test)
        return train, test
    test = table(d.eval, split=d.eval_split, **options)
    differ = (set(whole.rows[0]) ^ set(test.rows[0])) - OPTIONAL
    if differ:
        raise DataError(
            f"the rows for evaluation are {test.format}, and those for training {whole.format}",
            where=test.source,
            fix="Give both the same columns, or name the format: data.format=…",
        )
    task.check(whole, test)
    if d.limit is not None and d.limit < len(whole):
        whole = whole.split(d.limit, 0, config.seed)[0]
    if d.eval_rows is not None and d.eval_rows < len(test):
        test = test.split(d.eval_rows, 0, config.seed)[0]
    task.check(whole, test)
    return whole, test


def seen(task: Task, train: Table, test: Table) -> Table:
    """`test` without the rows whose labels happened to be drawn into it alone; they are counted as skipped."""
    known = set(task.names(train))
    new = [sorted(set(task.names(test.take([i]))) - known) for i in range(len(test))] if known else []
    out = [(test.place(i), f"the label {names[0]!r} is in no training row") for i, names in enumerate(new) if names]
    if not out:
        return test
    if len(out) == len(test):
        raise DataError(
            f"no row held back for evaluation has a label that training sees; {out[0][1]}", where=test.source, fix="More rows, or fewer rare labels"
        )
    return replace(test.take(i for i, names in enumerate(new) if not names), skipped=(*test.skipped, *out))


def load_model(config: TrainConfig, labels: list[str], processor: Path | None = None) -> tuple[Any, Any]:
    """The base and the processor (tokenizer, image processor, feature extractor) that the task uses.

    processor  a run's own, where it has kept one: what it serves with is what it was trained with

    Raises: ConfigError where there is none of that name.
    """
    model, tools, _ = _load(config, labels, processor)
    return model, tools


def _load(config: TrainConfig, labels: list[str], processor: Path | None = None) -> tuple[Any, Any, list[str]]:
    """... and the names of parameters that the checkpoint does not have, or of another shape, so that they are drawn."""
    import transformers

    task = find_task(config.task)
    path = model_path(config.model)
    if len(Path(path).parts) > 2 and not Path(path).exists():
        near = [p.name for p in Path(path).parent.glob("*")] if Path(path).parent.is_dir() else []
        raise ConfigError("there is no such folder", where=config.model, fix=f"Nearby: {did_you_mean(Path(path).name, near)}")
    extra: dict[str, Any] = {"dtype": torch.bfloat16 if config.bf16 and torch.cuda.is_available() else torch.float32, **quantization(config.quantization)}
    extra |= task.model_options
    if labels:
        extra |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    if task.head:
        extra["ignore_mismatched_sizes"] = True  # a head of another number of classes is drawn anew
    before, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # that the head is new is known here
    transformers.logging.disable_progress_bar()
    try:
        transformers.set_seed(config.seed)  # a fresh head is drawn
        own = processor if processor is not None and processor.is_dir() else path
        tools = task.load_processor(own)
        model, info = getattr(transformers, task.auto).from_pretrained(path, output_loading_info=True, **extra)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"the model cannot be loaded: {(str(e).splitlines() or [''])[0]}",
            where=config.model,
            fix=f"Give a folder that save_pretrained wrote, or a name of the hub, with a model for {config.task}",
        ) from e
    except (RuntimeError, ImportError, AttributeError, AssertionError) as e:
        if config.quantization is None:
            raise
        raise ConfigError(
            f"the base cannot be quantised here: {(str(e).splitlines() or [type(e).__name__])[0]}",
            where=f"quantization={config.quantization}",
            fix="Another quantisation, or a device that this one is made for (`veneer doctor` shows yours)",
        ) from e
    finally:
        transformers.logging.set_verbosity(before)
        if bar:
            transformers.logging.enable_progress_bar()
    if config.quantization is not None and not any(packed(p) or not p.is_floating_point() for p in model.parameters()):
        raise ConfigError(
            "nothing of the base was quantised: no linear has a size that this quantiser takes", where=f"quantization={config.quantization}",
            fix="Another quantisation, or none",
        )  # fmt: skip
    if hasattr(tools, "pad_token"):
        if tools.pad_token is None:
            tools.pad_token = tools.eos_token
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tools.pad_token_id
    mismatched = [k[0] if isinstance(k, tuple) else k for k in info.get("mismatched_keys", ())]
    return model, tools, sorted({*info["missing_keys"], *mismatched})


def prepare(config: TrainConfig, rows: tuple[Table, Table] | None = None) -> Prepared:
    """Load, attach, encode. Nothing is written. Raises: ConfigError, DataError, PlanError, SiteError."""
    plan = Plan.from_dict(config.plan, where="plan")
    task = find_task(config.task)(config)
    if config.packing and not task.packs:
        raise ConfigError(f"{task.name} has no rows that could be packed", where="packing", fix="packing=false")
    for key, names in meant_for().items():
        if task.name not in names and getattr(config, key) != TrainConfig.model_fields[key].default:
            raise ConfigError(f"{task.name} has no use for it", where=key, fix=f"Leave it out; it is for {', '.join(names)}")
    train, test = rows or tables(config)
    labels = task.labels = task.names(train)
    model, tools, fresh = _load(config, labels)
    asked = borrowed(config, model, plan)
    plan = with_heads(config, plan, asked, heads(asked, fresh, model, task.head) if task.head or task.fresh else [])
    adapter = attach(model, plan, name=config.name, tokenizer=tools)
    for name in config.adapters:
        detach(model, name)
    task.model, task.tools = model, tools
    task.longest = longest(config, model, tools, adapter)
    task.ready()
    if task.auto == "AutoModelForCausalLM" and config.quantization is None:
        check_causal(model)
    if config.packing:
        check_packing(model, adapter.plan)
    encoded = encode(task, train), encode(task, test)
    if any(len(e.skipped) > len(t.skipped) for e, t in zip(encoded, (train, test), strict=True)):
        task.check(train.take(encoded[0].rows), test.take(encoded[1].rows))  # what is left may lack a class
    data = [e.data for e in encoded]
    if config.packing:
        from datasets import Dataset

        data = [Dataset.from_list(pack(d.to_list(), task.longest)) for d in data]
    return Prepared(config, model, tools, adapter.plan, adapter, asked, *data, labels, task, (train, test), encoded)


def borrowed(config: TrainConfig, model: Any, plan: Plan) -> Plan:
    """`plan` with what it uses of `config.adapters` written out; those are attached to `model`, without their heads.
    Raises: ConfigError (a name that the plan does not use, no such folder), AdapterError, StoreError."""
    from ..serve.opened import adapter_in

    for name, folder in config.adapters.items():
        load(model, adapter_in(Path(folder))[0], name, activate=False, head=False)
    if not plan.unresolved():
        if config.adapters:
            raise ConfigError("the plan uses none of them", where="adapters", fix=f"In the plan: {{use: {next(iter(config.adapters))}}}")
        return plan
    if not config.adapters:
        raise ConfigError("the plan uses an adapter, and none is given", where="adapters", fix="adapters: {NAME: the folder of its run}")
    state = state_of(model)
    return written_out(plan, lambda name: state.adapters[known(state, name)])[0]


def longest(config: TrainConfig, model: Any, tools: Any, adapter: Adapter) -> int:
    """`max_length`, or what the model and its tokenizer can take with the plan's prompts before it, where that is less."""
    prompts = sum(int(part.prompt().shape[0]) for part in adapter.parts if part.site.port == "embed")
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    table_ = getattr(text, "max_position_embeddings", None) or config.max_length + prompts
    own = getattr(tools, "model_max_length", None) or config.max_length
    found = min(config.max_length, int(min(own, 1 << 40)), table_ - prompts)
    if found < 2:
        raise ConfigError(f"the model takes {table_} tokens, and the plan's prompts alone are {prompts}", where="plan", fix="A shorter prompt")
    return found


def encode(task: Task, rows: Table) -> Encoded:
    """The rows as tensors' lists, in chunks. Raises: DataError at the first row that cannot be used, unless such rows are
    skipped; and where none is left."""
    from datasets import Dataset

    out: list[dict[str, Any]] = []
    kept, lengths = [], []
    skipped = list(rows.skipped)
    for at in range(0, len(rows), CHUNK):
        for i, found in enumerate(task.encode(rows.rows[at : at + CHUNK]), at):
            if isinstance(found, BadRow):
                if task.config.data.on_error != "skip":
                    raise found.at(rows.place(i))
                skipped.append((rows.place(i), found.reason))
                continue
            lengths.append(found.pop("length"))
            kept.append(i)
            out.append(found)
    if not out:
        raise DataError(f"no row can be used; the first for: {skipped[0][1]}" if skipped else "there are no rows", where=rows.source)
    return Encoded(Dataset.from_list(out), kept, lengths, sum(n > task.longest for n in lengths), skipped)
