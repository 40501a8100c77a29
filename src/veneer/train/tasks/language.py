"""Tasks that write text: language modelling, conversations, and text to text."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq

from ...data.chat import IGNORE, by_spans, encode_chat, set_template
from ...data.formats import BadRow
from ...data.packing import PackedCollator
from ...errors import ConfigError
from .base import Task

NOTHING = "no token of it is learnt"


class _Decoder(Task):
    """Ids and labels from a subclass's `tokens`, cut, checked and padded (or packed)."""

    auto = "AutoModelForCausalLM"
    by_token = True
    packs = True

    def tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        out: list[dict[str, Any] | BadRow] = []
        for row in rows:
            try:
                ids, labels = self.tokens(row)
                cut, seen = ids[: self.longest], labels[: self.longest]
                if all(v == IGNORE for v in seen[1:]):  # nothing predicts the first token
                    why = f": its answer begins after token {self.longest}, where it is cut" if any(v != IGNORE for v in labels[1:]) else ""
                    raise BadRow(NOTHING + why, "Raise max_length, mend the row, or skip such rows: data.on_error=skip")
                out.append({"input_ids": cut, "labels": seen, "length": len(ids)})
            except BadRow as bad:
                out.append(bad)
        return out

    def collator(self) -> Any:
        return PackedCollator(self.tools.pad_token_id) if self.config.packing else DataCollatorForSeq2Seq(self.tools, label_pad_token_id=IGNORE)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        return self.learnt(row["input_ids"], row["labels"])

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        from ..observe import samples

        return {"samples": samples(trainer.model, self.tools, run.encoded[1].data)}


class CausalLM(_Decoder):
    """Next-token cross-entropy on plain text, or on the completions of prompts. Every text ends with the tokenizer's
    end-of-text token, so that the model learns to stop; a prompt's tokens count with loss_on=all."""

    name = "causal-lm"
    formats = ("prompt-completion", "text")

    def ready(self) -> None:
        if not self.tools.is_fast:
            raise ConfigError(
                "the tokenizer gives no offsets, which the loss mask needs", where="model", fix="Use a model with a fast tokenizer (tokenizer.json)"
            )

    def tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        prompt, rest = row.get("prompt", ""), row.get("completion", row.get("text"))
        if not isinstance(prompt, str) or not isinstance(rest, str):
            raise BadRow("the prompt or completion is a list of messages", "task=chat takes those")
        start = 0 if self.config.loss_on == "all" else len(prompt)
        ids, labels = by_spans(self.tools, prompt + rest, [(start, len(prompt + rest))], special=True)
        if start == 0:
            labels = list(ids)
        return ids, labels


class Chat(_Decoder):
    """Supervised fine-tuning on conversations: next-token cross-entropy on what the assistant says (loss_on=all: on
    everything), in the tokenizer's own chat template or in `chat_template`."""

    name = "chat"
    formats = ("messages", "sharegpt", "alpaca", "prompt-completion")

    def ready(self) -> None:
        set_template(self.tools, self.config.chat_template)

    def tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        messages = row.get("messages") or [*_turn("user", row["prompt"]), *_turn("assistant", row["completion"])]
        if self.config.loss_on != "all" and not any(m["role"] == "assistant" for m in messages):
            raise BadRow(f"{NOTHING}: the assistant says nothing")
        return encode_chat(self.tools, messages, self.config.loss_on)


def _turn(role: str, said: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


class TextToText(Task):
    """Cross-entropy of the target's tokens given the source's (encoder-decoder models)."""

    name = "text-to-text"
    auto = "AutoModelForSeq2SeqLM"
    formats = ("translation", "text-to-text", "prompt-completion")
    by_token = True

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        out: list[dict[str, Any] | BadRow] = []
        sources = [r.get("source", r.get("prompt")) for r in rows]
        targets = [r.get("target", r.get("completion")) for r in rows]
        if not all(isinstance(t, str) for t in (*sources, *targets)):
            return [BadRow("a list of messages", "task=chat takes those")] * len(rows)
        given, lengths = self.tokenize(sources)
        wanted = self.tools(text_target=targets, truncation=True, max_length=self.longest, verbose=False)["input_ids"]
        for ids, labels, length in zip(given["input_ids"], wanted, lengths, strict=True):
            out.append({"input_ids": ids, "labels": labels, "length": max(length, len(labels))})
        return out

    def collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.tools, model=self.model, label_pad_token_id=IGNORE)

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        from ..observe import samples

        return {"samples": samples(trainer.model, self.tools, run.encoded[1].data)}

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(self.tools.decode(row["input_ids"]), False), (" → " + self.tools.decode(row["labels"]), True)]
