"""A conversation with a base and its adapters, line by line, streamed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter import active
from ..errors import CapabilityError, ConfigError, VeneerError, did_you_mean
from ..files import write_whole
from .opened import Opened
from .writing import GREEDY, check_room


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: at most `max_new_tokens`; temperature 0 takes the likeliest token each time (the default, so
    that a conversation can be repeated); `seed` for the rest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        own: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            own["temperature"] = self.temperature
        return own if self.temperature > 0 else own | GREEDY


class Chat:
    """Keeps the messages, answers a line with a stream of text, and carries out lines that begin with '/'.

    The conversation is put to the model with the tokenizer's chat template, as in training. A tokenizer without one is of a
    model that continues text: each line is then continued, and nothing is remembered.

    Raises: CapabilityError for a model that does not generate text.
    """

    def __init__(self, opened: Opened, sampling: Sampling | None = None, system: str | None = None) -> None:
        if not getattr(opened.model, "can_generate", lambda: False)() or opened.tokenizer is None:
            raise CapabilityError(f"{type(opened.model).__name__} does not generate text", where=str(opened.folder), fix="Use it with veneer predict")
        self.opened, self.sampling, self.system = opened, sampling or Sampling(), system
        self.templated = bool(getattr(opened.tokenizer, "chat_template", None))
        if system is not None and not self.templated:
            raise ConfigError("the tokenizer has no chat template, so a system message has no place", where="--system", fix="Leave it out")
        self.messages: list[dict[str, str]] = []
        self.over = False
        self._halt = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []

    def greeting(self) -> str:
        """The first line: what is spoken to."""
        how = "" if self.templated else "; its tokenizer has no chat template, so each line is continued as text"
        return f"{self.opened.base or type(self.opened.model).__name__} with {self._using()}{how}. /help lists the commands."

    def line(self, text: str) -> Iterator[str]:
        """What to show for the line `text`, piece by piece: a command's answer, or the model's."""
        text = text.strip()
        if not text:
            return
        try:
            if not text.startswith("/"):
                yield from self.answer(text)
                return
            word, *rest = text.split()
            if word not in COMMANDS:
                raise ConfigError(f"there is no command {word}", fix=did_you_mean(word, COMMANDS))
            yield COMMANDS[word][0](self, rest)
        except VeneerError as e:  # the conversation goes on
            yield str(e)

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to `text`, piece by piece as it is made; both are remembered, also when stopped midway."""
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        tokenizer, model = self.opened.tokenizer, self.opened.model
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.templated:
            batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            batch = tokenizer(text, return_tensors="pt")
        batch = {k: v.to(model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        check_room(model, batch["input_ids"].shape[1], self.sampling.max_new_tokens, "/reset begins anew; --max-new-tokens makes answers shorter")
        self._halt.clear()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                torch.manual_seed(self.sampling.seed)
                stop = StoppingCriteriaList([lambda ids, scores, **k: torch.full((len(ids),), self._halt.is_set(), device=ids.device)])
                with torch.no_grad():
                    model.generate(**batch, **self.sampling.options(), streamer=streamer, stopping_criteria=stop, pad_token_id=tokenizer.pad_token_id)
            except BaseException as e:  # the reader must learn of it, whatever it is
                failure.append(e)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        said: list[str] = []
        try:
            for piece in streamer:
                said.append(piece)
                yield piece
        finally:
            self._halt.set()
            thread.join()
            if not failure and self.templated:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if failure:
            raise failure[0]

    def stop(self) -> None:
        """End the answer that is being made."""
        self._halt.set()

    def _using(self) -> str:
        names = active(self.opened.model)
        return " + ".join(names) if names else "no adapter (the base)"

    # -- commands -------------------------------------------------------------------------------------------------------
    def _adapter(self, names: list[str]) -> str:
        if names:
            self.opened.use(names)
        on = active(self.opened.model)
        return "\n".join(f"{'*' if n in on else ' '} {n}" for n in self.opened.names)

    def _base(self, rest: list[str]) -> str:
        self.opened.use([])
        return "the base, without adapters"

    def _save(self, rest: list[str]) -> str:
        if len(rest) != 1:
            raise ConfigError("/save takes one file", fix="For example /save talk.jsonl")
        if not self.messages:
            raise ConfigError("there is no conversation yet", fix="Say something first")
        write_whole(Path(rest[0]), (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
        return f"{len(self.messages)} messages in {rest[0]}"

    def _reset(self, rest: list[str]) -> str:
        self.reset()
        return "a new conversation"

    def _help(self, rest: list[str]) -> str:
        return "\n".join(f"{word:<10} {what}" for word, (_, what) in COMMANDS.items())

    def _quit(self, rest: list[str]) -> str:
        self.over = True
        return "bye"


COMMANDS: dict[str, tuple[Callable[[Chat, list[str]], str], str]] = {
    "/adapter": (Chat._adapter, "list the adapters; with a name, or several, switch to them"),
    "/base": (Chat._base, "switch all adapters off"),
    "/save": (Chat._save, "write the conversation to a file, as a line of messages that training reads"),
    "/reset": (Chat._reset, "forget the conversation"),
    "/help": (Chat._help, "show this"),
    "/quit": (Chat._quit, "leave; so does the end of the input"),
}
