"""One run: from a configuration to a folder with the adapter, its score, and all that using it needs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.tables import Table
from ..errors import ConfigError, StoreError
from ..plan import Plan
from ..report.run import CONFIG, as_yaml, report
from ..store import save, write_whole
from ..summary import summary
from .config import TrainConfig
from .fit import find_micro_batch, ran_out, release, roomy
from .folder import ADAPTER, CHECKPOINTS, PROCESSOR, RUN, check_folder, full_disk, read_run, write
from .observe import Seen, hardware, observe
from .prepare import Prepared, load_model, prepare, tables
from .progress import Progress
from .rates import rate_of
from .together import gathered, meet, processes, rank, some
from .trackers import trackers, until_evaluated
from .written import best_of, measures

__all__ = ["ADAPTER", "CHECKPOINTS", "PROCESSOR", "RUN", "Prepared", "Result", "load_model", "prepare", "read_run", "run", "tables"]


@dataclass
class Result:
    """What a run gave: scores on the evaluation rows, trainable parameters and their share, seconds, the model; and why it
    stopped before its end, where it did."""

    output: Path
    metrics: dict[str, float]
    trainable: int
    share: float
    seconds: float
    model: Any = field(repr=False, default=None)
    tokenizer: Any = field(repr=False, default=None)
    evaluation: Any = field(repr=False, default=None)
    stopped: str = ""


@dataclass
class Batch:
    """`micro` rows at a time, `accumulate` times, in each process: together what the configuration asks for."""

    micro: int
    accumulate: int
    checkpointing: bool = False

    def smaller(self, to: int) -> Batch:
        return Batch(to, self.accumulate * self.micro // to, self.checkpointing)


def arguments(p: Prepared, output: Path, batch: Batch, quiet: bool = False) -> Any:
    """The Trainer's arguments for `p`, whose checkpoints go under `output`."""
    config, task = p.config, p.task
    if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU has no bf16", where="bf16", fix="bf16=false")
    rows = batch.micro * batch.accumulate * processes()
    steps = max(1, -(-len(p.train) // rows))
    total = config.max_steps if config.max_steps > 0 else math.ceil(steps * config.epochs)
    every = min(config.checkpoint_every or steps, total)
    cls, own = task.arguments()
    metric, greater = best_of(p)
    args = cls(
        **own
        | dict(
            output_dir=str(output / CHECKPOINTS),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            per_device_train_batch_size=batch.micro,
            per_device_eval_batch_size=config.eval_batch_size,
            gradient_accumulation_steps=batch.accumulate,
            learning_rate=config.learning_rate or rate_of(p.asked),
            weight_decay=config.weight_decay,
            warmup_steps=int(config.warmup * total),
            bf16=config.bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=config.seed,
            eval_strategy="steps" if config.choose_best else "no",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=config.keep_checkpoints,
            load_best_model_at_end=config.choose_best,
            metric_for_best_model=metric,
            greater_is_better=greater,
            logging_steps=max(1, min(10, every, total // 40)),
            logging_nan_inf_filter=False,
            report_to=trackers(config.report_to),
            run_name=str(output),
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding" if p.model.main_input_name == "input_ids" else "no",
            dataloader_num_workers=config.data.workers,
            dataloader_persistent_workers=config.data.workers > 0,
            dataloader_pin_memory=torch.cuda.is_available(),
            log_level="error" if quiet else "passive",
        )
    )
    args.gradient_checkpointing = False  # `checkpoint` does it, where the estimate says so; trl's default is True
    return args


def make_trainer(p: Prepared, output: Path, batch: Batch, callbacks: list[Any], quiet: bool = False) -> Any:
    """The task's Trainer for `p`, whose checkpoints go under `output`."""
    from transformers import PrinterCallback

    from .trainer import Advance

    config, task, args = p.config, p.task, arguments(p, output, batch, quiet)
    trainer = task.trainer()(
        model=p.model, args=args, train_dataset=p.train, eval_dataset=p.evaluation, data_collator=task.collator(),
        compute_metrics=Seen(task.scores) if task.scores is not None else None, callbacks=callbacks, processing_class=p.tokenizer,
    )  # fmt: skip
    trainer.adapter_name, trainer.task, trainer.written = config.name, task, p.written
    # a loss that is a mean over the rows of each micro-batch must be divided by their number; one over tokens is by theirs
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and task.by_token
    trainer.add_callback(Advance())
    trainer.remove_callback(PrinterCallback)
    return trainer


def fitted(p: Prepared, trainer: Any, batch: Batch) -> Batch:
    """The batch as the memory has room for it: the longest rows first, then fewer at a time."""
    rows = longest_rows(p, trainer, batch.micro)
    auto = p.config.gradient_checkpointing == "auto" and getattr(p.model, "supports_gradient_checkpointing", False)
    on = batch.checkpointing or auto and not roomy(trainer, rows[0], batch.micro)
    if on:
        checkpoint(p.model)
    batch = Batch(batch.micro, batch.accumulate, on)
    return batch.smaller(find_micro_batch(trainer, rows, batch.micro))


def checkpoint(model: Any) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} cannot checkpoint its gradients", where="gradient_checkpointing", fix="gradient_checkpointing=false")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def longest_rows(p: Prepared, trainer: Any, count: int) -> list[dict[str, Any]]:
    """The `count` training rows that take most memory, the longest first, as `trainer` has them."""
    lengths = [len(ids) for ids in p.train["input_ids"]] if p.config.packing else p.encoded[0].lengths
    order = sorted(range(len(p.train)), key=lambda i: -min(lengths[i], p.task.longest))[:count]
    return [trainer.train_dataset[i] for i in order]


def allowed(config: TrainConfig) -> dict[str, Any]:
    """The configuration as run.json has it, once what can be refused before anything is loaded has not been: trackers that
    are not there, a folder that holds something else, keys that contradict each other. Raises: ConfigError, PlanError."""
    trackers(config.report_to)
    described = config.model_dump(mode="json") | {"plan": Plan.from_dict(config.plan, where="plan").to_dict()}
    check_folder(Path(config.output), described)
    if config.early_stopping and not config.choose_best:
        raise ConfigError("early_stopping needs evaluations", where="early_stopping", fix="choose_best=true")
    return described


def run(config: TrainConfig, *, callbacks: list[Any] | None = None, quiet: bool = False, rows: tuple[Table, Table] | None = None) -> Result:
    """Train as `config` says and write the run's folder: `adapter/`, `processor/`, `run.json`, `report.html`, and
    `checkpoints/` to go on from.

    A folder that holds a run of the same configuration is gone on with from its last checkpoint, to the same weights as
    without the break; a finished one is an error. A loss that is not finite or leaps ends the run with the last good state
    (`Result.stopped`). Ctrl-C saves a checkpoint and raises KeyboardInterrupt. Of several processes (torchrun) the first
    writes the folder, and all decide alike.

    Raises: ConfigError, DataError, PlanError, SiteError, StoreError.
    """
    from transformers import EarlyStoppingCallback, set_seed

    from .guards import Guard, Interrupt
    from .trainer import fill_with, last_checkpoint, tensors_in

    output, several = Path(config.output), meet()
    described = allowed(config)
    p = prepare(config, rows)
    known = read_run(output) if (output / RUN).exists() else {}
    if known.get("processes", several) != several:
        raise ConfigError(f"the run was begun by {known['processes']} processes, and this is {several}", where=str(output), fix="Go on with as many")
    begun = known.get("batch")
    batch = Batch(**begun) if begun else Batch(config.batch_size, config.gradient_accumulation, config.gradient_checkpointing is True)
    start = {k: v.detach().cpu().clone() for k, v in tensors_in(p.model, config.name).items()}
    begin = time.perf_counter()
    gathered(None)  # no process writes before each has looked at the folder
    first = rank() == 0
    with full_disk(output), Progress(quiet=quiet) as bar, until_evaluated() as defer:
        if first:
            write(output, described, p, None, vars(batch))
            with full_disk(output, writing=True):
                p.tokenizer.save_pretrained(output / PROCESSOR)
        while True:
            guard, interrupt = Guard(config.name, config.stop_on_spike), Interrupt()
            early = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
            watching = [bar, guard, interrupt, *early, *(callbacks or [])]
            trainer = make_trainer(p, output, batch, watching, quiet)
            fit = fitted(p, trainer, batch)
            if fit != batch:
                batch = fit
                if first:
                    write(output, described, p, None, vars(batch))
                trainer = make_trainer(p, output, batch, watching, quiet)
            last = gathered(last_checkpoint(output / CHECKPOINTS) if config.resume else None)[0]
            defer(trainer)
            set_seed(config.seed)
            try:
                with interrupt.listening():
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
                break
            except (RuntimeError, MemoryError) as e:
                if not ran_out(e):
                    raise
                if batch.micro == 1 or p.task.coupled:
                    raise ConfigError("out of memory while training", where="batch_size", fix="A smaller batch_size or max_length") from None
            batch = batch.smaller(next(n for n in range(batch.micro - 1, 0, -1) if batch.micro % n == 0))
            if several > 1:  # the others wait within the step, for good
                write(output, described, p, None, vars(batch))
                fix = f"The same command goes on from the last checkpoint, {batch.micro} rows at a time"
                raise ConfigError(f"out of memory while training, in process {rank()} of {several}", where="batch_size", fix=fix)
            trainer.accelerator.free_memory()
            trainer.optimizer = trainer.lr_scheduler = None
            release(p.model)
            fill_with(p.model, config.name, start, "the start")
        if some(interrupt.hit, trainer.args.device):
            raise KeyboardInterrupt
        best = trainer.state.best_metric
        if guard.reason and not (trainer.state.best_model_checkpoint and best is not None and math.isfinite(best)):
            if guard.good is None:
                raise ConfigError(
                    f"{guard.reason}, before there was a good state to keep", where=str(output), fix="A smaller learning_rate, or look at the data"
                )
            guard.restore(p.model)
        seconds = time.perf_counter() - begin
        metrics = reported(p, trainer.evaluate())
        observe(output, trainer, p)
        p.model.__dict__.pop("forward", None)  # trl's own, for its loss
        table = summary(p.model)
        result = {
            "metrics": metrics, "trainable": table.trainable, "share": table.share, "seconds": round(seconds, 2), "stopped": guard.reason,
            "parameters": table.rows, "hardware": hardware(), "log": trainer.state.log_history,
        }  # fmt: skip
        if first:
            save(p.model, output / ADAPTER, name=config.name)
            write_whole(output / CONFIG, as_yaml(described).encode())
            write(output, described, p, result, vars(batch))
            try:
                report(output)
            except StoreError as e:
                fix = f"The run is finished and whole; once there is room, `veneer report {output}` writes the page"
                raise StoreError(e.what, where=e.where, fix=fix) from e
    return Result(output, metrics, table.trainable, table.share, seconds, p.model, p.tokenizer, p.evaluation, guard.reason)


def reported(p: Prepared, found: dict[str, Any]) -> dict[str, float]:
    """The scores in what Trainer's evaluation says, by their own names."""
    scores = {k.removeprefix("eval_"): float(v) for k, v in found.items() if k.startswith("eval_")}
    return {k: v for k, v in scores.items() if k in measures(p)}
