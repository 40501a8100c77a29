"""Answers that are written, token after token."""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .answer import Answer, Row, placed


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

    def check(self, rows: list[Row], *, max_new_tokens: int = 64, **options: Any) -> None:
        check_room(self.task.model, self.tokens(rows)["input_ids"].shape[1], max_new_tokens)

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
