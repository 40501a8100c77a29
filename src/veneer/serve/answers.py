"""What a run says to rows that it has never seen: one class for each kind of answer, one line for each task.

Rows are encoded by the task itself, as in training; what they have not (the label that is asked for) stands in as a blank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.chat import IGNORE
from ..data.formats import BadRow
from ..errors import DataError

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

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        from ..train.tasks.embedding import pooled

        encoded = self.encoded([{"text": r["text"]} for r in rows])
        batch = {k: v for k, v in self.task.collator()(encoded).items() if k != "labels"}
        return [{"embedding": v} for v in pooled(self.task.model, placed(batch, self.task.model)).float().tolist()]

    def shown(self, answer: Row) -> str:
        v = answer["embedding"]
        return f"[{', '.join(f'{x:.3f}' for x in v[:4])}, … {len(v)} numbers]"


class Filled(Answer):
    """{'text': the text with its masks filled, 'words': the likeliest token for each mask with its probability}. A text
    without a mask is an error."""

    echoes = False

    def __call__(self, rows: list[Row], **options: Any) -> list[Row]:
        tools, out = self.task.tools, []
        batch = tools([r["text"] for r in rows], padding=True, truncation=True, max_length=self.task.longest, return_tensors="pt")
        chances = torch.softmax(self.task.model(**placed(dict(batch), self.task.model)).logits.float(), -1).cpu()
        for row, ids, p in zip(rows, batch["input_ids"], chances, strict=True):
            at = (ids == tools.mask_token_id).nonzero().flatten().tolist()
            if not at:
                raise DataError(f"no {tools.mask_token} is in {row['text'][:60]!r}", fix=f"Write {tools.mask_token} where a word is to be found")
            best = [(tools.decode([int(p[i].argmax())]), float(p[i].max())) for i in at]
            text = row["text"]
            for word, _ in best:
                text = text.replace(tools.mask_token, word, 1)
            out.append({"text": text, "words": [{"word": w, "probability": c} for w, c in best]})
        return out

    def shown(self, answer: Row) -> str:
        words = ", ".join(f"{w['word']} {w['probability']:.3f}" for w in answer["words"])
        return f"{answer['text']}  ({words})"


class Continuation(Answer):
    """{'text': what follows}; in files the column is `prompt` or `text`."""

    blanks = {"completion": "-"}
    echoes = False
    writes = True

    def expected(self, row: Row) -> str:
        """What should follow; nothing where the row is plain text."""
        return row.get("completion", "")

    def prompt(self, row: Row) -> str:
        return row.get("prompt") or row["text"]

    def asked(self, row: Row) -> str:
        """What is asked, for a person."""
        return self.prompt(row)

    def tokens(self, rows: list[Row]) -> Any:
        """The prompts as a padded batch."""
        return self.task.tools([self.prompt(r) for r in rows], padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)

    def __call__(self, rows: list[Row], *, max_new_tokens: int = 64, **options: Any) -> list[Row]:
        tools, model = self.task.tools, self.task.model
        batch = placed({k: v for k, v in self.tokens(rows).items() if k in ("input_ids", "attention_mask")}, model)
        start = batch["input_ids"].shape[1]
        check_room(model, start, max_new_tokens)
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tools.pad_token_id, **GREEDY)
        after = out if model.config.is_encoder_decoder else out[:, start:]
        return [{"text": t} for t in tools.batch_decode(after, skip_special_tokens=True)]

    def shown(self, answer: Row) -> str:
        return answer["text"]


GREEDY = {"temperature": None, "top_p": None, "top_k": None}  # a model's own settings for drawing would be warned about


def check_room(model: Any, used: int, new: int, fix: str = "Ask for less: --max-new-tokens") -> None:
    """Raise DataError where `used` tokens and `new` ones are more than the model's positions."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and not model.config.is_encoder_decoder and used + new > room:
        raise DataError(f"the text has {used} tokens, and with an answer of {new} it is over the model's {room}", fix=fix)


class Reply(Continuation):
    """{'text': the assistant's answer} to a conversation, in the chat template of training. An assistant's last turn in the
    row is what is asked for, and left out."""

    asks = "messages"
    blanks = {"completion": "-", "output": "-", "chosen": "-", "rejected": "-"}

    def row(self, text: str) -> Row:
        return {"messages": [{"role": "user", "content": text}]}

    def expected(self, row: Row) -> str:
        said = row.get("completion") or row.get("chosen") or row["messages"]
        return said if isinstance(said, str) else str(said[-1]["content"])

    def turns(self, row: Row) -> list[dict[str, Any]]:
        """The conversation up to what is asked for."""
        said: Any = row.get("messages") or row.get("prompt") or row.get("chosen")
        talk: list[dict[str, Any]] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said or ())
        return talk[:-1] if talk and talk[-1]["role"] == "assistant" else talk

    def asked(self, row: Row) -> str:
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.turns(row))

    def tokens(self, rows: list[Row]) -> Any:
        return self.task.tools.apply_chat_template(
            [self.turns(r) for r in rows],
            add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt", tokenizer_kwargs={"padding_side": "left"}
        )  # fmt: skip


class Target(Continuation):
    """{'text': what the source becomes}, by an encoder-decoder."""

    asks = "source"
    blanks = {"target": "-", "completion": "-"}

    def expected(self, row: Row) -> str:
        return row.get("target") or row["completion"]

    def prompt(self, row: Row) -> str:
        return row.get("source") or row["prompt"]

    def tokens(self, rows: list[Row]) -> Any:
        given = [self.prompt(r) for r in rows]
        return self.task.tools(given, padding=True, truncation=True, max_length=self.task.longest, return_tensors="pt", return_token_type_ids=False)


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
