"""A class for every word: named entities, parts of speech."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForTokenClassification, EvalPrediction

from ...data.chat import IGNORE
from ...data.formats import BadRow
from ...data.tables import Table
from ...errors import ConfigError
from .base import CLASSES, Task, class_scores, logits_of, rows_of

AROUND = 6  # words on either side of a wrong one that the report shows


class TokenClassification(Task):
    """Cross-entropy at the first token of each word; the others of a word are ignored (Devlin et al. 2019, 5.3)."""

    name = "token-classification"
    auto = "AutoModelForTokenClassification"
    formats = ("tokens",)
    head = True
    by_token = True
    measures = CLASSES | {"span_f1": True}
    best = "span_f1"

    def names(self, table: Table) -> list[str]:
        return sorted(set(self.marks(table)))

    def marks(self, table: Table) -> list[str]:
        return [tag for row in table.rows for tag in row["tags"]]

    def ready(self) -> None:
        if not self.tools.is_fast:
            raise ConfigError("the tokenizer cannot say which word a token is of", where="model", fix="Use a model with a fast tokenizer (tokenizer.json)")
        if getattr(self.tools, "add_prefix_space", None) is False:
            self.tools.add_prefix_space = True

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        options = {"is_split_into_words": True}
        found = self.tools([r["tokens"] for r in rows], truncation=True, max_length=self.longest, return_token_type_ids=False, **options)
        _, lengths = self.tokenize([r["tokens"] for r in rows], **options)  # type: ignore[misc]
        out: list[dict[str, Any] | BadRow] = []
        for i, (encoded, row, length) in enumerate(zip(rows_of(dict(found)), rows, lengths, strict=True)):
            words = found.word_ids(i)
            labels = [IGNORE if w is None or w == before else self.labels.index(row["tags"][w]) for w, before in zip(words, [None, *words], strict=False)]
            out.append(encoded | {"labels": labels, "length": length})
        return out

    def collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tools)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        out: list[tuple[str, bool]] = []
        for token, label in zip(self.tools.convert_ids_to_tokens(row["input_ids"]), row["labels"], strict=True):
            out += [(f"{token} ", False)] if label < 0 else [(f"{token}", False), (f"/{self.labels[label]} ", True)]
        return out

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        from ..observe import classes

        last = trainer.compute_metrics.last
        counted = last.label_ids != IGNORE
        rows = run.encoded[1].data
        tokens = [(k, j) for k, r in enumerate(rows) for j, label in enumerate(r["labels"]) if label != IGNORE]

        def around(i: int) -> str:
            k, j = tokens[i]
            words = run.tables[1].rows[run.encoded[1].rows[k]]["tokens"]
            w = self.tools(words, truncation=True, max_length=self.longest, is_split_into_words=True).word_ids()[j]
            return " ".join([*words[max(0, w - AROUND) : w], f"[{words[w]}]", *words[w + 1 : w + 1 + AROUND]])

        return classes(EvalPrediction(logits_of(last)[counted], last.label_ids[counted]), self.labels, around)

    def scores(self, prediction: Any) -> dict[str, float]:
        """Accuracy and macro-F1 over words, and F1 over spans: those that begin, end and are called the same (CoNLL-2003)."""
        guess, truth = logits_of(prediction).argmax(-1), prediction.label_ids
        counted = truth != IGNORE
        hits = found = real = 0
        for g, t, c in zip(guess, truth, counted, strict=True):
            a, b = spans([self.labels[i] for i in g[c]]), spans([self.labels[i] for i in t[c]])
            hits, found, real = hits + len(a & b), found + len(a), real + len(b)
        return class_scores(guess[counted], truth[counted]) | {"span_f1": 2 * hits / (found + real) if found + real else 0.0}


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first, last, type) of what the tags mark: BIO and BIOES; a tag without such a prefix marks its own run; O none."""
    out, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, dash, rest = tag.partition("-")
        mark, name = (mark, rest) if dash and mark in ("B", "I", "E", "S") else ("I", tag if tag != "O" else "")
        if kind and (mark in ("B", "S") or name != kind):
            out.add((start, i - 1, kind))
            kind = ""
        if name and not kind:
            start, kind = i, name
    return out
