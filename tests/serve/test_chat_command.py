"""Conversations, in Python and through a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import veneer as vn
from veneer.serve.chat import COMMANDS, Chat, Sampling
from veneer.serve.opened import open_folder


@pytest.fixture(scope="module")
def opened(runs):
    return open_folder(runs["lora"], more=[str(runs["ia3"])])


def say(chat, text):
    return "".join(chat.line(text))


def test_an_answer_is_what_generate_gives(opened):
    chat = Chat(opened, Sampling(6), system="be brief")
    pieces = list(chat.line("the number 3"))
    assert len(pieces) > 1  # it streams
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the number 3"}]
    batch = opened.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = opened.model.generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=False)
    wanted = opened.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces).strip() == wanted.strip() and wanted.strip()
    assert chat.messages == [*asked, {"role": "assistant", "content": "".join(pieces)}]


def test_commands(opened, tmp_path):
    chat = Chat(opened, Sampling(4))
    first = say(chat, "the number 3")
    assert "* adapter" in say(chat, "/adapter") and "  ia3" in say(chat, "/adapter")
    assert "* ia3" in say(chat, "/adapter ia3") and vn.active(opened.model) == ("ia3",)
    say(chat, "/adapter adapter ia3")
    assert vn.active(opened.model) == ("adapter", "ia3")
    assert "base" in say(chat, "/base") and vn.active(opened.model) == ()
    assert "Did you mean 'ia3'" in say(chat, "/adapter ia33") and "Did you mean '/adapter'" in say(chat, "/adaptor")
    say(chat, "/adapter adapter")
    say(chat, f"/save {tmp_path / 'talk.jsonl'}")
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": chat.messages} and len(chat.messages) == 2
    say(chat, "/reset")
    assert chat.messages == [] and "no conversation" in say(chat, "/save x")
    assert say(chat, "the number 3") == first  # nothing was remembered
    assert all(word in say(chat, "/help") for word in COMMANDS)
    say(chat, "/quit")
    assert chat.over


def test_stopped_midway(opened):
    chat = Chat(opened, Sampling(400))
    stream = chat.answer("the number 3")
    next(stream)
    chat.stop()
    rest = list(stream)
    assert len(rest) < 100 and threading.active_count() < 20
    assert chat.messages[-1]["role"] == "assistant"


def test_errors_do_not_end_the_conversation(opened, monkeypatch):
    chat = Chat(opened, Sampling(5000))
    assert "is over the model's 2048" in say(chat, "hello")
    monkeypatch.setattr(type(opened.model), "generate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        say(Chat(opened, Sampling(4)), "hello")


def test_a_classifier_does_not_talk(runs):
    with pytest.raises(vn.CapabilityError, match="does not generate text.*veneer predict"):
        Chat(open_folder(runs["bert"]))


def test_without_a_template_lines_are_continued(opened, monkeypatch):
    monkeypatch.setattr(opened.tokenizer, "chat_template", None)
    chat = Chat(opened, Sampling(4))
    assert "no chat template" in chat.greeting()
    opened.use(["adapter"])
    assert say(chat, "the number 3") and chat.messages == []
    with pytest.raises(vn.ConfigError, match="--system"):
        Chat(opened, system="x")


def test_through_a_pipe(runs, tmp_path):
    lines = f"the number 3\n/adapter ia3\nthe number 3\n/base\n/save {tmp_path / 't.jsonl'}\n"
    args = ["chat", str(runs["lora"]), str(runs["ia3"]), "--max-new-tokens", "5"]
    done = subprocess.run([sys.executable, "-m", "veneer", *args], input=lines, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "with adapter. /help" in done.stdout and "* ia3" in done.stdout and "4 messages in" in done.stdout
    assert len(json.loads((tmp_path / "t.jsonl").read_text())["messages"]) == 4


def test_drawing_depends_on_the_seed_alone(opened):
    opened.use(["adapter"])
    a, b, c = (say(Chat(opened, Sampling(12, 2.0, seed)), "the number 3") for seed in (1, 1, 2))
    assert a == b != c and torch.is_grad_enabled()
