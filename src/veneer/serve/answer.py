"""What a run says to rows that it has never seen: the base of the kinds of answers.

Rows are encoded by the task itself, as in training; what they have not (the label that is asked for) stands in as a blank.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..data.formats import BadRow

Row = dict[str, Any]


class Answer:
    """Base of the answers. `task` is prepared: its model, tools and labels are set.

    asks    the field that a plain word of the command line fills
    blanks  fields that need not be there, each with what takes its place
    formats of data, beside the task's own
    echoes  whether an answer says little without what it answers, so that a person is shown both
    """

    asks: ClassVar[str] = "text"
    blanks: ClassVar[dict[str, Any]] = {}
    formats: ClassVar[tuple[str, ...]] = ()
    echoes: ClassVar[bool] = True
    writes: ClassVar[bool] = False  # text, of which `expected` says what a row itself has

    def expected(self, row: Row) -> str:
        raise NotImplementedError

    def __init__(self, task: Any) -> None:
        self.task = task

    def blank(self, name: str, row: Row) -> Any:
        """What stands in for the field `name` of `row`."""
        return self.blanks[name]

    def row(self, text: str) -> Row:
        """A row from a plain text (or a file's path)."""
        row: Row = {self.asks: text}
        return row | {name: self.blank(name, row) for name in self.blanks if name != self.asks}

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        """The answers to `rows`, in their order. Raises: DataError for a row that cannot be used."""
        raise NotImplementedError

    def check(self, rows: list[Row], **options: Any) -> None:
        """Raise what answering would for rows that cannot be used; the model is not asked."""
        self.encoded(rows)

    def shown(self, answer: Row) -> str:
        """An answer as a line for a person."""
        return str(answer["label"])

    # -- what several do alike ----------------------------------------------------------------------------------------
    def encoded(self, rows: list[Row]) -> list[Row]:
        if not self.writes:  # a label that a file has, perhaps one that training never saw, plays no part
            rows = [row | {name: self.blank(name, row) for name in self.blanks if name in row} for row in rows]
        found = self.task.encode(rows)
        for i, row in enumerate(found, 1):
            if isinstance(row, BadRow):
                raise row.at(f"input {i}")
        return [{k: v for k, v in row.items() if k != "length"} for row in found]

    def logits(self, rows: list[Row]) -> tuple[Tensor, list[Row]]:
        """The model's logits in fp32, and the encoded rows."""
        encoded = self.encoded(rows)
        batch = {k: v for k, v in self.task.collator()(encoded).items() if k != "labels"}
        return self.task.model(**placed(batch, self.task.model)).logits.float(), encoded


def placed(batch: Row, model: Any) -> Row:
    """The batch's tensors on the model's device; floats in its dtype."""
    first = next(model.parameters())
    return {k: v.to(first.device, first.dtype) if v.is_floating_point() else v.to(first.device) for k, v in batch.items()}
