"""One class for each kind of answer, one line for each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..data.chat import IGNORE
from ..errors import DataError
from .answer import Answer, Row, placed
from .writing import Continuation, Reply, Target


class OneClass(Answer):
    """{'label': the likeliest class, 'probabilities': {class: p}}, the likeliest first."""

    blanks = {"label": ""}

    def blank(self, name: str, row: Row) -> Any:
        return self.task.labels[0]

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        out = []
        for p in torch.softmax(self.logits(rows)[0], -1).tolist():
            ranked = sorted(zip(self.task.labels, p, strict=True), key=lambda e: -e[1])
            out.append({"label": ranked[0][0], "probabilities": dict(ranked)})
        return out

    def shown(self, answer: Row) -> str:
        return f"{answer['label']}  ({', '.join(f'{name} {p:.3f}' for name, p in list(answer['probabilities'].items())[:5])})"


class Chosen(OneClass):
    """As `OneClass`, of the row's own choices, or of the labels that the run was trained with: p is the softmax of their mean
    log-probabilities."""

    def blank(self, name: str, row: Row) -> Any:
        found = row.get("choices", self.task.labels)
        if not found:
            raise DataError("there is nothing to choose among", fix="Give rows with a prompt and its choices: --file rows.jsonl")
        return found[0]

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        from ..ops.choices import normalised, token_log_probs

        batch = placed(self.task.collator()(self.encoded(rows)), self.task.model)
        logits, targets = self.task.logits(self.task.model, batch)
        out = []
        for row, p in zip(rows, torch.softmax(normalised(token_log_probs(logits, targets), targets != IGNORE), -1).tolist(), strict=True):
            ranked = sorted(zip(self.task.choices(row)[1], p, strict=False), key=lambda e: -e[1])
            out.append({"label": ranked[0][0], "probabilities": dict(ranked)})
        return out


class OfPicture(OneClass):
    """As `OneClass`, of a picture's file."""

    asks = "image"

    def row(self, text: str) -> Row:
        return super().row(text) | {self.asks: {"path": text}}


class OfSound(OfPicture):
    """As `OneClass`, of a sound's file."""

    asks = "audio"


class SeveralClasses(Answer):
    """{'labels': classes of probability over 0.5, 'probabilities': {class: p}}."""

    blanks = {"label": []}

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        out = []
        for p in torch.sigmoid(self.logits(rows)[0]).tolist():
            named = dict(zip(self.task.labels, p, strict=True))
            out.append({"labels": [n for n, v in named.items() if v > 0.5], "probabilities": named})
        return out

    def shown(self, answer: Row) -> str:
        return " | ".join(f"{n} {answer['probabilities'][n]:.3f}" for n in answer["labels"]) or "(none)"


class Number(Answer):
    """{'value': the number}."""

    blanks = {"label": "0"}

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        return [{"value": v} for v in self.logits(rows)[0].reshape(-1).tolist()]

    def shown(self, answer: Row) -> str:
        return f"{answer['value']:.4f}"


class Tags(Answer):
    """{'tokens': the words, 'tags': a tag for each}; None for words beyond the model's length."""

    asks = "tokens"
    blanks = {"tags": []}
    echoes = False

    def blank(self, name: str, row: Row) -> Any:
        words = row.get("tokens")
        return [self.task.labels[0]] * (len(words) if isinstance(words, (list, tuple)) else 1)

    def row(self, text: str) -> Row:
        words = text.split()
        return {"tokens": words, "tags": self.blank("tags", {"tokens": words})}

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        logits, encoded = self.logits(rows)
        out = []
        for row, best, one in zip(rows, logits.argmax(-1).tolist(), encoded, strict=True):
            tags: list[Any] = [self.task.labels[b] for b, label in zip(best, one["labels"], strict=False) if label != IGNORE]
            out.append({"tokens": row["tokens"], "tags": tags + [None] * (len(row["tokens"]) - len(tags))})
        return out

    def shown(self, answer: Row) -> str:
        return " ".join(f"{w}/{t or '?'}" for w, t in zip(answer["tokens"], answer["tags"], strict=True))


class Vector(Answer):
    """{'embedding': the text's vector, of length 1}."""

    blanks = {"pair": "-", "label": "0"}
    formats = ("text",)

    def row(self, text: str) -> Row:
        return {"text": text}

    def encoded(self, rows: list[Row]) -> list[Row]:
        return super().encoded([{"text": r["text"]} for r in rows])

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        from ..train.tasks.embedding import pooled

        encoded = self.encoded(rows)
        batch = {k: v for k, v in self.task.collator()(encoded).items() if k != "labels"}
        return [{"embedding": v} for v in pooled(self.task.model, placed(batch, self.task.model)).float().tolist()]

    def shown(self, answer: Row) -> str:
        v = answer["embedding"]
        return f"[{', '.join(f'{x:.3f}' for x in v[:4])}, … {len(v)} numbers]"


class Filled(Answer):
    """{'text': the text with its masks filled, 'words': the likeliest token for each mask with its probability}. A text
    without a mask is an error."""

    echoes = False

    def masked(self, rows: list[Row]) -> tuple[Any, list[list[int]]]:
        """The batch, and where each row's masks are. Raises: DataError for a row without one."""
        tools = self.task.tools
        batch = tools([r["text"] for r in rows], padding=True, truncation=True, max_length=self.task.longest, return_tensors="pt")
        places = [(ids == tools.mask_token_id).nonzero().flatten().tolist() for ids in batch["input_ids"]]
        for row, at in zip(rows, places, strict=True):
            if not at:
                raise DataError(f"no {tools.mask_token} is in {row['text'][:60]!r}", fix=f"Write {tools.mask_token} where a word is to be found")
        return batch, places

    def check(self, rows: list[Row], **options: Any) -> None:
        self.masked(rows)

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        tools, out = self.task.tools, []
        batch, places = self.masked(rows)
        chances = torch.softmax(self.task.model(**placed(dict(batch), self.task.model)).logits.float(), -1).cpu()
        for row, at, p in zip(rows, places, chances, strict=True):
            best = [(tools.decode([int(p[i].argmax())]), float(p[i].max())) for i in at]
            text = row["text"]
            for word, _ in best:
                text = text.replace(tools.mask_token, word, 1)
            out.append({"text": text, "words": [{"word": w, "probability": c} for w, c in best]})
        return out

    def shown(self, answer: Row) -> str:
        words = ", ".join(f"{w['word']} {w['probability']:.3f}" for w in answer["words"])
        return f"{answer['text']}  ({words})"


ANSWERS: dict[str, Callable[[Any], Answer]] = {
    "text-classification": OneClass,
    "multi-label-classification": SeveralClasses,
    "regression": Number,
    "token-classification": Tags,
    "causal-lm": Continuation,
    "masked-lm": Filled,
    "chat": Reply,
    "dpo": Reply,
    "text-to-text": Target,
    "image-classification": OfPicture,
    "audio-classification": OfSound,
    "sentence-embedding": Vector,
    "choice": Chosen,
    "text-to-choice": Chosen,
}
