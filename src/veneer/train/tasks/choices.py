"""Answers to choose among, by a language model: T-Few's recipe (Liu et al., NeurIPS 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data.chat import by_spans
from ...data.formats import BadRow
from ...data.tables import Table
from ...ops.choices import IGNORE, normalised, t_few_loss, token_log_probs
from .base import CLASSES, Task, class_scores, logits_of


class TextToChoice(Task):
    """An encoder-decoder reads the prompt and scores each candidate y by β(y) = (1/T) Σ_t log p(y_t | x, y_<t).

        loss = L_LM + L_UL + L_LN        (see ops/choices.py), and the answer is argmax_y β(y)

    Rows are a prompt, its choices and the right one (format 'choices'), or a text and a label: then every row's choices are
    the labels' names. With plan: t-few this is T-Few; any other plan trains alike. A batch is rows times choices.
    """

    name = "text-to-choice"
    auto = "AutoModelForSeq2SeqLM"
    formats = ("choices", "text-label")
    measures = CLASSES
    best = "accuracy"

    def names(self, table: Table) -> list[str]:
        """Of labelled rows, the choices of each; none where every row has its own."""
        return [] if "choices" in table.rows[0] else table.names

    def choices(self, row: dict[str, Any]) -> tuple[str, list[str], int]:
        """The prompt, the candidates, and the number of the right one."""
        found = row.get("choices", self.labels)
        if len(found) < 2:
            raise BadRow(f"{len(found)} choices", "There must be two or more to choose among")
        label = row["label"]
        if label in found:
            return row["prompt"] if "prompt" in row else row["text"], found, found.index(label)
        if "choices" in row and isinstance(label, str) and label.isdigit() and int(label) < len(found):
            return row["prompt"], found, int(label)
        raise BadRow(f"the label {label!r} is none of the choices", "Give one of them, or its number, counted from 0")

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        out: list[dict[str, Any] | BadRow] = []
        for row in rows:
            try:
                prompt, found, answer = self.choices(row)
                ids, targets, length = self.tensors(prompt, found)
                if any(all(t == IGNORE for t in target) for target in targets):
                    raise BadRow("a choice has no tokens, or lies beyond max_length", "Raise max_length, or mend the row")
                out.append({"input_ids": ids, "targets": targets, "labels": answer, "length": length})
            except BadRow as bad:
                out.append(bad)
        return out

    def tensors(self, prompt: str, found: list[str]) -> tuple[list[list[int]], list[list[int]], int]:
        """What the model reads for each choice, the tokens that are scored, and the length before it was cut."""
        columns, lengths = self.tokenize([prompt])
        targets = self.tools(text_target=found, truncation=True, max_length=self.longest)["input_ids"]
        return columns["input_ids"] * len(found), targets, lengths[0]

    def collator(self) -> Any:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            most = max(len(r["targets"]) for r in rows)
            blank = [self.tools.pad_token_id]
            flat = [{"input_ids": ids} for r in rows for ids in [*r["input_ids"], *[blank] * (most - len(r["input_ids"]))]]
            batch = dict(self.tools.pad(flat, return_tensors="pt"))
            targets = [t for r in rows for t in [*r["targets"], *[[IGNORE]] * (most - len(r["targets"]))]]
            filled = torch.tensor(self.filled(targets)).unflatten(0, (len(rows), most))
            return batch | {"targets": filled, "labels": torch.tensor([r["labels"] for r in rows])}

        return collate

    def filled(self, targets: list[list[int]]) -> list[list[int]]:
        """The targets, all of one length."""
        width = max(map(len, targets))
        return [t + [IGNORE] * (width - len(t)) for t in targets]

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k not in ("labels", "targets")}

    def logits(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, C, T, V) and the targets (B, C, T) that they predict."""
        targets = batch["targets"]
        return model(**self.inputs(batch), labels=targets.flatten(0, 1)).logits.unflatten(0, targets.shape[:2]), targets

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        logits, targets = self.logits(model, batch)
        found = t_few_loss(logits, targets, batch["labels"])
        return found, {"loss": found, "logits": normalised(token_log_probs(logits, targets), targets != IGNORE)}

    def scores(self, prediction: Any) -> dict[str, float]:
        return class_scores(logits_of(prediction).argmax(-1), prediction.label_ids)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        ids, answer = row["input_ids"][0], row["targets"][row["labels"]]
        return [(self.tools.decode(ids, skip_special_tokens=True), False), (" → " + self.tools.decode(answer, skip_special_tokens=True), True)]


class Choice(TextToChoice):
    """The same for a decoder, which reads the prompt with each candidate behind it."""

    name = "choice"
    auto = "AutoModelForCausalLM"

    def tensors(self, prompt: str, found: list[str]) -> tuple[list[list[int]], list[list[int]], int]:
        start = prompt if prompt[-1].isspace() else prompt + " "
        pairs = [by_spans(self.tools, start + choice, [(len(start), len(start + choice))], special=True) for choice in found]
        most = self.longest
        return [ids[:most] for ids, _ in pairs], [labels[:most] for _, labels in pairs], max(len(ids) for ids, _ in pairs)

    def filled(self, targets: list[list[int]]) -> list[list[int]]:
        width, left = max(map(len, targets)), self.tools.padding_side == "left"
        return [[IGNORE] * (width - len(t)) + t if left else t + [IGNORE] * (width - len(t)) for t in targets]

    def logits(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        targets = batch["targets"]
        return model(**self.inputs(batch)).logits[:, :-1].unflatten(0, targets.shape[:2]), targets[..., 1:]
