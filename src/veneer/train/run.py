"""One run: from a configuration to a folder with the adapter, its score, and all that using it needs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapter import Adapter
from ..attach import attach
from ..data.builtin import model_path, table
from ..data.tables import Table
from ..errors import ConfigError, DataError
from ..methods import Full
from ..plan import Plan
from ..report.run import CONFIG, as_yaml, report
from ..store import save, write_whole
from ..summary import summary
from .config import TrainConfig
from .observe import Seen, hardware, observe
from .progress import Progress
from .rates import rate_of
from .trackers import trackers

RUN, CHECKPOINTS, ADAPTER = "run.json", "checkpoints", "adapter"


@dataclass
class Result:
    """What a run gave: scores on the evaluation rows, trainable parameters and their share, seconds, the model."""

    output: Path
    metrics: dict[str, float]
    trainable: int
    share: float
    seconds: float
    model: Any = field(repr=False, default=None)
    tokenizer: Any = field(repr=False, default=None)
    evaluation: Any = field(repr=False, default=None)


@dataclass
class Prepared:
    """All that a run needs before its first step."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    plan: Plan
    adapter: Adapter
    train: Any
    evaluation: Any
    labels: list[str]


def tables(config: TrainConfig) -> tuple[Table, Table]:
    """The training and the evaluation rows."""
    d = config.data
    labelled = config.task == "text-classification"
    options = {"text": d.text, "label": d.label, "encoding": d.encoding, "formats": ("text-label",) if labelled else ("text",)}
    whole = table(d.train, **options)
    if labelled and len(whole.names) < 2:
        raise DataError(f"there is only one label, {whole.names[0]!r}", where=d.train, fix="A classifier needs two labels or more")
    if d.eval is None:
        held = d.eval_rows or max(1, len(whole) // 10)
        return whole.split(min(d.limit or len(whole), len(whole) - held), held, config.seed)
    test = table(d.eval, **options)
    extra = sorted(set(test.names) - set(whole.names))
    if extra:
        raise DataError(f"labels that training never sees: {', '.join(extra)}", where=d.eval, fix="Take those rows out, or add examples of them")
    if d.limit is not None and d.limit < len(whole):
        whole = whole.split(d.limit, 0, config.seed)[0]
    if d.eval_rows is not None and d.eval_rows < len(test):
        test = test.split(d.eval_rows, 0, config.seed)[0]
    return whole, test


def load_model(config: TrainConfig, labels: list[str]) -> tuple[Any, Any]:
    """The base and its tokenizer. Raises: ConfigError where there is none of that name."""
    import transformers

    path = model_path(config.model)
    kind = {"text-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}[config.task]
    extra: dict[str, Any] = {"dtype": torch.bfloat16} if config.bf16 and torch.cuda.is_available() else {"dtype": torch.float32}
    if labels:
        extra |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    before, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # that the head is new is known here
    transformers.logging.disable_progress_bar()
    try:
        transformers.set_seed(config.seed)  # a fresh head is drawn
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = getattr(transformers, kind).from_pretrained(path, **extra)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"the model cannot be loaded: {str(e).splitlines()[0]}", where=config.model, fix="Give a folder that save_pretrained wrote, or a name of the hub"
        ) from e
    finally:
        transformers.logging.set_verbosity(before)
        if bar:
            transformers.logging.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def prepare(config: TrainConfig, rows: tuple[Table, Table] | None = None) -> Prepared:
    """Load, attach, tokenise. Nothing is written. Raises: ConfigError, DataError, PlanError, SiteError."""
    plan = Plan.from_dict(config.plan, where="plan")
    train, test = rows or tables(config)
    labels = train.names if config.task == "text-classification" else []
    model, tokenizer = load_model(config, labels)
    if labels and not any(m.name == "full" and m.at == "head" for m in plan.leaves()):
        plan = plan + Full(at="head")  # the head is drawn at random, so it must learn
    adapter = attach(model, plan, name=config.name, tokenizer=tokenizer)
    longest = min(config.max_length, getattr(model.config, "max_position_embeddings", config.max_length) or config.max_length)
    return Prepared(config, model, tokenizer, plan, adapter, encode(train, tokenizer, labels, longest), encode(test, tokenizer, labels, longest), labels)


def encode(rows: Table, tokenizer: Any, labels: list[str], longest: int) -> Any:
    """A dataset of input_ids, attention_mask and labels (a class, or for language modelling the tokens: the collator)."""
    from datasets import Dataset

    data: dict[str, Any] = dict(tokenizer(rows.texts, truncation=True, max_length=longest, return_token_type_ids=False))
    if labels:
        assert rows.labels is not None
        data["labels"] = [labels.index(name) for name in rows.labels]
    return Dataset.from_dict(data)


def scores(prediction: Any) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over classes of 2TP / (2TP + FP + FN)."""
    logits, truth = prediction.predictions, prediction.label_ids
    guess = np.asarray(logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    f1 = []
    for c in range(int(max(truth.max(), guess.max())) + 1):
        hit, either = int(((guess == c) & (truth == c)).sum()), int((guess == c).sum() + (truth == c).sum())
        f1.append(2 * hit / either if either else 0.0)
    return {"accuracy": float((guess == truth).mean()), "macro_f1": float(np.mean(f1))}


def run(config: TrainConfig, *, callbacks: list[Any] | None = None, quiet: bool = False, rows: tuple[Table, Table] | None = None) -> Result:
    """Train as `config` says and write the run's folder: `adapter/`, `run.json`, `report.html`, and `checkpoints/` to go on from.

    A folder that holds a run of the same configuration is gone on with from its last checkpoint; a finished one is an
    error. Raises: ConfigError, DataError, PlanError, SiteError, StoreError.
    """
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, PrinterCallback, TrainingArguments, set_seed

    from .trainer import AdapterTrainer, Advance, last_checkpoint

    output = Path(config.output)
    report_to = trackers(config.report_to)
    described = config.model_dump(mode="json") | {"plan": Plan.from_dict(config.plan, where="plan").to_dict()}
    check_folder(output, described)
    p = prepare(config, rows)
    classify = bool(p.labels)
    steps = max(1, -(-len(p.train) // (config.batch_size * config.gradient_accumulation)))
    total = config.max_steps if config.max_steps > 0 else int(np.ceil(steps * config.epochs))
    every = config.checkpoint_every or steps
    args = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate or rate_of(p.plan),
        weight_decay=config.weight_decay,
        warmup_steps=int(config.warmup * total),
        bf16=config.bf16,
        seed=config.seed,
        eval_strategy="steps" if config.choose_best else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=config.choose_best,
        metric_for_best_model="macro_f1" if classify else "loss",
        greater_is_better=classify,
        logging_steps=max(1, min(10, every, total // 40)),
        report_to=report_to,
        run_name=str(output),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding" if p.model.main_input_name == "input_ids" else "no",
        dataloader_pin_memory=torch.cuda.is_available(),
        log_level="error" if quiet else "passive",
    )
    collator = DataCollatorWithPadding(p.tokenizer) if classify else DataCollatorForLanguageModeling(p.tokenizer, mlm=False)
    seen, bar = Seen(scores), Progress(quiet=quiet)
    trainer = AdapterTrainer(
        model=p.model, args=args, train_dataset=p.train, eval_dataset=p.evaluation, data_collator=collator,
        compute_metrics=seen if classify else None, callbacks=[bar, *(callbacks or [])],
    )  # fmt: skip
    trainer.adapter_name = config.name
    trainer.add_callback(Advance())
    if config.gradient_checkpointing:
        p.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.remove_callback(PrinterCallback)
    write(output, described, p, None)
    last = last_checkpoint(output / CHECKPOINTS) if config.resume else None
    set_seed(config.seed)
    begin = time.perf_counter()
    with bar:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        seconds = time.perf_counter() - begin
        found = trainer.evaluate()
    metrics = {k.removeprefix("eval_"): float(v) for k, v in found.items() if k in ("eval_loss", "eval_accuracy", "eval_macro_f1")}
    save(p.model, output / ADAPTER, name=config.name)
    table_ = summary(p.model)
    observe(output, trainer, p, seen.last)
    write_whole(output / CONFIG, as_yaml(described).encode())
    write(
        output,
        described,
        p,
        {
            "metrics": metrics, "trainable": table_.trainable, "share": table_.share, "seconds": round(seconds, 2), "parameters": table_.rows,
            "hardware": hardware(), "log": trainer.state.log_history,
        },
    )  # fmt: skip
    report(output)
    return Result(output, metrics, table_.trainable, table_.share, seconds, p.model, p.tokenizer, p.evaluation)


def check_folder(output: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError where `output` holds something else than an unfinished run of this configuration."""
    if not (output / RUN).exists():
        if output.exists() and any(output.iterdir()):
            raise ConfigError("the folder is not empty and holds no run", where=str(output), fix="Choose another output=…")
        return
    old = read_run(output)
    different = [k for k in described if old["config"].get(k) != described[k] and k != "resume"]
    if different:
        raise ConfigError(
            f"the folder holds a run of another configuration (other {', '.join(different)})",
            where=str(output),
            fix="Choose another output=…, or delete the folder",
        )
    if old.get("result") is not None:
        raise ConfigError("the run in this folder is finished", where=str(output), fix="Use it (veneer predict), choose another output=…, or delete the folder")


def write(output: Path, described: dict[str, Any], p: Prepared, result: dict[str, Any] | None) -> None:
    import transformers

    from .. import __version__

    data = {
        "config": described,
        "plan": p.plan.to_dict(),
        "labels": p.labels,
        "versions": {"veneer": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "result": result,
    }
    write_whole(output / RUN, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def read_run(output: Path) -> dict[str, Any]:
    """What `run.json` in the folder says. Raises: ConfigError where there is none."""
    try:
        data = json.loads((output / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "this folder is not a run: it has no run.json", where=str(output), fix="Give the folder that `veneer train` or `veneer demo` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"run.json is damaged: {e}", where=str(output)) from None
    if not isinstance(data, dict) or "config" not in data or "labels" not in data:
        raise ConfigError("run.json is not one of ours", where=str(output))
    return data
