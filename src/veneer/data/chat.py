"""Conversations as tokens, with the tokens that are to be learnt: what the assistant says, found in one of two ways.

1. A template with `{% generation %}` markers says it itself.
2. Any other template is rendered turn by turn. Where each rendering is the beginning of the next, the assistant's part is
   what its turn added after the prompt for it; where a template rewrites earlier turns, that cannot be told, and the
   conversation is refused rather than half masked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .formats import BadRow

IGNORE = -100  # torch's cross-entropy leaves this label out
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML}
Messages = list[dict[str, Any]]


def set_template(tokenizer: Any, template: str | None) -> None:
    """Give the tokenizer the template `template`: a name of `TEMPLATES` or a file. None leaves its own.

    Raises: ConfigError where there is none in the end, where it is broken, or where it does not show roles.
    """
    where = "chat_template"
    if template is not None:
        if template not in TEMPLATES and not Path(template).is_file():
            raise ConfigError(f"{template!r} is neither a file nor a known template", where=where, fix=f"Known: {', '.join(TEMPLATES)}")
        try:
            tokenizer.chat_template = TEMPLATES[template] if template in TEMPLATES else Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"the template {template!r} cannot be read as UTF-8: {e}", where=where) from None
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template",
            where=where,
            fix=f"Name a file, or one of {', '.join(TEMPLATES)}: chat_template=chatml; or use an -Instruct model",
        )
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer gives no offsets, which the loss mask needs", where="model", fix="Use a model with a fast tokenizer (tokenizer.json)")
    import jinja2

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"the chat template is broken: {e.message}, line {e.lineno}", where=where, fix="Mend it, or chat_template=chatml") from None
    except Exception:  # what it says of these turns is told of the rows that it refuses
        pass
    try:
        said = [render(tokenizer, [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]) for role in ("assistant", "user")]
    except BadRow:
        return  # a template that insists on turns by turn does show roles
    if said[0] == said[1]:
        raise ConfigError("the chat template does not show roles: user and assistant look alike", where=where, fix="Use one that does: chat_template=chatml")


def render(tokenizer: Any, messages: Messages, prompt: bool = False) -> str:
    """The conversation as text, and with `prompt` the beginning of an answer. Raises: BadRow with what the template says."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as e:
        raise BadRow(f"the chat template refuses it: {e}") from None
    except (TypeError, KeyError, ValueError) as e:
        raise BadRow(f"the chat template fails: {type(e).__name__}: {e}") from None


def spans(tokenizer: Any, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Where in `text`, the rendered conversation, the assistant speaks: (first, last + 1) in characters, its end mark
    included. Raises: BadRow where the template rewrites earlier turns."""
    out = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before, after = render(tokenizer, messages[:i], prompt=True), render(tokenizer, messages[: i + 1])
            if not text.startswith(after) or not after.startswith(before):
                raise BadRow(
                    f"the chat template renders turn {i + 1} otherwise when more follows, and has no generation markers, so the loss mask cannot be told",
                    "Mark the answers in the template with {% generation %} (chat_template=FILE), end conversations after the first answer, or set loss_on=all",
                )
            out.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return out


def encode_chat(tokenizer: Any, messages: Messages, loss_on: str = "answers") -> tuple[list[int], list[int]]:
    """Token ids, and labels of the same length: the id where it is learnt, `IGNORE` elsewhere.

    loss_on  'answers': what the assistant says, with its end mark; 'all': every token

    Raises: BadRow.
    """
    if loss_on == "all":
        ids = list(tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"])
        return ids, list(ids)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        render(tokenizer, messages)  # its errors are told in words
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return ids, [t if m else IGNORE for t, m in zip(ids, mask, strict=True)]
    text = render(tokenizer, messages)
    return by_spans(tokenizer, text, spans(tokenizer, messages, text), special=False)


def by_spans(tokenizer: Any, text: str, where: list[tuple[int, int]], *, special: bool) -> tuple[list[int], list[int]]:
    """Token ids of `text`, learnt where they overlap one of the character spans. `special` adds the tokenizer's own
    tokens at the ends, and an end-of-text token that is learnt where the last span reaches the end."""
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    labels = [t if any(b < to and e > at for at, to in where) and e > b else IGNORE for t, (b, e) in zip(ids, found["offset_mapping"], strict=True)]
    end = tokenizer.eos_token_id
    if special and end is not None and where and where[-1][1] >= len(text):
        if ids[-1] != end:
            ids, labels = [*ids, end], [*labels, end]
        labels[-1] = end
    return ids, labels
