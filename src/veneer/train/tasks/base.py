"""What a task is: which rows it takes, which model, how rows become tensors, what is learnt, and how that is scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import transformers

from ...data.formats import BadRow
from ...data.tables import Table
from ...errors import DataError


class Task:
    """Base of the tasks. A subclass says by its attributes what it needs, and by `encode` what a row becomes.

    name         as in a configuration;  auto: transformers' class that loads the model
    formats      of data, in the order in which they are looked for
    processor    transformers' class that turns rows into tensors, its options in `processor_options`
    head         whether the model's head is drawn anew and must be trained with the plan
    fresh        whether what else the checkpoint lacks is trained with the plan; with `head` it always is
    measures     what an evaluation gives, each with whether more is better
    best         which of them the best checkpoint is chosen by, if the configuration names none
    by_token     whether the loss is a mean over tokens (of the whole batch), not over rows
    coupled      whether the loss compares the rows of a batch, so that a smaller micro-batch would change it
    packs        whether rows may be packed
    cuts         the configuration's key by which long rows are cut; '' where all rows are of one size

    Once prepared, `config` (TrainConfig), `labels`, `tools` (the processor), `model` and `longest` (tokens) are set.
    """

    name: ClassVar[str]
    auto: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    processor: ClassVar[str] = "AutoTokenizer"
    processor_options: ClassVar[dict[str, Any]] = {}
    head: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    measures: ClassVar[dict[str, bool]] = {"loss": False}
    best: ClassVar[str] = "loss"
    by_token: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    cuts: ClassVar[str] = "max_length"
    model_options: ClassVar[dict[str, Any]] = {}
    loss: Callable[..., Any] | None = None
    scores: Callable[..., dict[str, float]] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.labels: list[str] = []
        self.tools: Any = None
        self.model: Any = None
        self.longest = config.max_length

    @classmethod
    def load_processor(cls, path: Any) -> Any:
        """The processor that lies at `path`. Raises: what from_pretrained does."""
        return getattr(transformers, cls.processor).from_pretrained(path, **cls.processor_options)

    # -- data ---------------------------------------------------------------------------------------------------------
    def names(self, table: Table) -> list[str]:
        """The classes in a table, in the order of the logits; empty where there are none."""
        return []

    def marks(self, table: Table) -> list[str]:
        """Every label that stands in a table, for its balance."""
        return []

    def check(self, train: Table, test: Table) -> None:
        """Raise DataError where the tables do not fit each other or the task."""
        names = self.names(train)
        if self.head and not names and type(self).names is not Task.names or len(names) == 1:
            found = f"only one label, {names[0]!r}" if names else "no label"
            raise DataError(f"there is {found}", where=train.source, fix="A classifier needs two labels or more")
        extra = sorted(set(self.names(test)) - set(names))
        if extra:
            shown = ", ".join(extra[:10]) + (f" and {len(extra) - 10} more" if len(extra) > 10 else "")
            first = next(i for i in range(len(test)) if set(self.names(test.take([i]))) & set(extra))
            raise DataError(f"labels that training never sees: {shown}", where=test.place(first), fix="Take those rows out, or add examples of them")

    def ready(self) -> None:
        """Called once `tools` is loaded and before rows are encoded. Raises: ConfigError."""

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        """What the collator takes for each row, with 'length' (before it was cut); or why a row cannot be used."""
        raise NotImplementedError

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        raise NotImplementedError

    def inputs(self, batch: Any) -> dict[str, Any]:
        """What of a batch the model itself takes, without what only the loss needs."""
        return {k: v for k, v in batch.items() if k != "labels"}

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        """What the report shows of the last evaluation: labels, counts and mistakes, or samples; nothing by default."""
        return {}

    def measured(self, length: int) -> str:
        """A row's length for a person: a number of tokens, where a task counts nothing else."""
        return str(length)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether it is learnt, for the preview."""
        return []

    def trainer(self) -> type:
        """The Trainer that runs it, and `arguments` its TrainingArguments' class."""
        from ..trainer import AdapterTrainer

        return AdapterTrainer

    def arguments(self) -> tuple[type, dict[str, Any]]:
        return transformers.TrainingArguments, {}

    def picture(self, row: dict[str, Any]) -> str | None:
        """A row as a small picture for the report, a data URI of a PNG; None where it is none."""
        return None

    # -- what several tasks do alike --------------------------------------------------------------------------------------
    def tokenize(self, texts: list[str], pairs: list[str] | None = None, **options: Any) -> tuple[dict[str, list[Any]], list[int]]:
        """Token ids cut to `longest`, and the lengths that they would have had."""
        types = pairs is not None and "token_type_ids" in self.tools.model_input_names
        args = (texts, pairs) if pairs is not None else (texts,)
        found = self.tools(*args, truncation=True, max_length=self.longest, return_token_type_ids=types, **options)
        lengths = [len(ids) for ids in found["input_ids"]]
        full = [i for i, n in enumerate(lengths) if n >= self.longest]
        if full:
            whole = self.tools(*([a[i] for i in full] for a in args), verbose=False, return_token_type_ids=False, **options)
            for i, ids in zip(full, whole["input_ids"], strict=True):
                lengths[i] = len(ids)
        return dict(found), lengths

    def learnt(self, ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
        """Runs of tokens, decoded, with whether their labels count."""
        out: list[tuple[str, bool]] = []
        start = 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or (labels[i] >= 0) != (labels[start] >= 0):
                out.append((self.tools.decode(ids[start:i], clean_up_tokenization_spaces=False), labels[start] >= 0))
                start = i
        return out


CLASSES = {"loss": False, "accuracy": True, "macro_f1": True}  # what `class_scores` gives, beside the loss


def confusion(task: Task, trainer: Any, run: Any) -> dict[str, Any]:
    """`answers` of a task with one class for each row."""
    from ..observe import classes

    table, encoded = run.tables[1], run.encoded[1]

    def text(i: int) -> str:
        own = [v for k, v in table.rows[encoded.rows[i]].items() if k != "label" and isinstance(v, str)]  # as it was written
        return " ~ ".join(own) or task.segments(encoded.data[i])[0][0]

    return classes(trainer.compute_metrics.last, task.labels, text, lambda i: task.picture(encoded.data[i]))


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """{'a': [1, 2]} -> [{'a': 1}, {'a': 2}]"""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def logits_of(prediction: Any) -> np.ndarray:
    found = prediction.predictions
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def class_scores(guess: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over classes of 2TP / (2TP + FP + FN)."""
    f1 = []
    for c in range(int(max(truth.max(), guess.max())) + 1):
        hit, either = int(((guess == c) & (truth == c)).sum()), int((guess == c).sum() + (truth == c).sum())
        f1.append(2 * hit / either if either else 0.0)
    return {"accuracy": float((guess == truth).mean()), "macro_f1": float(np.mean(f1))}
