"""The loss mask of conversations: the assistant's words and nothing else, by markers or by turns."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

import veneer as vn
from veneer.data.builtin import model_path
from veneer.data.chat import CHATML, IGNORE, encode_chat, set_template
from veneer.data.formats import BadRow

PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")  # the same text, unmarked
# what a reasoning template does: thoughts stay in the last turn only
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('::')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SAID = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "who are you ?"},
    {"role": "assistant", "content": "a model ."},
    {"role": "user", "content": "and who am i ?"},
    {"role": "assistant", "content": "you ."},
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("minilm"))


def learnt(tokenizer, messages, loss_on="answers"):
    ids, labels = encode_chat(tokenizer, messages, loss_on)
    assert len(ids) == len(labels) and all(y in (t, IGNORE) for t, y in zip(ids, labels, strict=True))
    return tokenizer.decode([y for y in labels if y != IGNORE]), ids, labels


def test_with_and_without_markers_the_same_tokens_are_learnt(tokenizer):
    set_template(tokenizer, "chatml")
    marked = learnt(tokenizer, SAID)
    tokenizer.chat_template = PLAIN
    assert learnt(tokenizer, SAID) == marked
    assert marked[0] == "a model. < | im _ end | > you. < | im _ end | >"  # with the marks that end them
    assert learnt(tokenizer, SAID, "all")[1] == marked[1] and learnt(tokenizer, SAID, "all")[2] == marked[1]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_learnt(tokenizer):
    tokenizer.chat_template = FORGETFUL
    said = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "thinking::hello"), ("user", "and"), ("assistant", "more::bye"))]
    with pytest.raises(BadRow, match="turn 2 otherwise when more follows.*no generation markers"):
        encode_chat(tokenizer, said)
    assert learnt(tokenizer, said[:2])[0].replace(" ", "") == "thinking::hello"


def test_what_a_template_refuses_is_a_bad_row(tokenizer):
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(BadRow, match="refuses it: roles must alternate"):
        encode_chat(tokenizer, SAID[:1] + SAID[3:])
    set_template(tokenizer, None)  # it does show roles


def test_templates_that_cannot_serve(tokenizer, tmp_path):
    with pytest.raises(vn.ConfigError, match="no chat template.*chat_template=chatml"):
        set_template(tokenizer, None)
    with pytest.raises(vn.ConfigError, match="neither a file nor a known template.*chatml"):
        set_template(tokenizer, "chatlm")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(vn.ConfigError, match="does not show roles: user and assistant look alike"):
        set_template(tokenizer, str(tmp_path / "t.jinja"))
