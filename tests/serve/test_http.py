"""Many adapters on one base behind HTTP: mixed batches, the same answers as alone, and mistakes of the asker."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import veneer as vn
from veneer.cli import app
from veneer.serve.batching import Batcher, Request
from veneer.serve.http import create_app
from veneer.serve.opened import open_folder


@pytest.fixture(scope="module")
def opened(runs):
    return open_folder(runs["lora"], name="lora", more=[f"{runs['ia3']}=ia3", f"{runs['gated']}=gated"])


@pytest.fixture
def client(opened):
    with TestClient(create_app(opened, most=8, wait=0.5)) as client:
        yield client


PROMPTS = {"lora": "the number 3", "ia3": "the number 12 is after", "gated": "what", "base": "the"}


def alone(opened, name, prompt, tokens):
    opened.use([] if name == "base" else [name])
    ids = opened.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = opened.model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return opened.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_mixed_batch_answers_as_each_adapter_alone(opened, client):
    wanted = {n: alone(opened, n, p, 6) for n, p in PROMPTS.items()}
    assert len(set(wanted.values())) > 1

    def ask(name):
        return client.post("/v1/completions", json={"model": name, "prompt": PROMPTS[name], "max_tokens": 6}).json()

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(PROMPTS, pool.map(ask, PROMPTS), strict=True))
    assert {n: f["choices"][0]["text"] for n, f in found.items()} == wanted
    assert max(client.app.state.batcher.sizes) == (4, 4)  # one batch of four rows and four adapters
    usage = found["ia3"]["usage"]
    assert usage["prompt_tokens"] == 5 and usage["total_tokens"] == 5 + usage["completion_tokens"] and found["ia3"]["model"] == "ia3"


def test_lengths_are_each_askers_own(opened, client):
    found = client.post("/v1/completions", json={"model": "lora", "prompt": ["the number 3", "what"], "max_tokens": 3}).json()
    assert [c["text"] for c in found["choices"]] == [alone(opened, "lora", p, 3) for p in ("the number 3", "what")]
    assert found["choices"][0]["finish_reason"] == "length"


def test_chat_and_what_is_served(opened, client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", "lora", "ia3", "gated"]
    assert client.get("/health").json()["adapters"] == ["lora", "ia3", "gated"]
    found = client.post("/v1/chat/completions", json={"model": "ia3", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).json()
    text = opened.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": alone(opened, "ia3", text, 4)}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "lorra", "prompt": "a"}, 400, "Did you mean 'lora'"),
        ({"prompt": "a", "max_tokens": 5000}, 400, "over the model's 2048"),
        ({"prompt": "a", "max_tokens": 0}, 422, "max_tokens"),
        ({"prompt": "a", "stream": True}, 422, "stream"),
        ({"prompt": "a", "top_k": 3}, 422, "top_k"),
    ],
)
def test_a_mistake_of_the_asker(client, body, status, says):
    found = client.post("/v1/completions", json=body)
    assert found.status_code == status and says in found.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).status_code == 200  # it goes on


def test_drawn_rows_wait_for_their_like_and_failures_reach_who_asked(opened, monkeypatch):
    batcher = Batcher(opened, most=8, wait=0.3)
    asked = [batcher.ask(Request((1, 2), name, 2, heat)) for name, heat in (("lora", 0.0), ("ia3", 1.0), (None, 0.0))]
    assert all(len(a.result(timeout=60)) <= 2 for a in asked)
    assert sorted(batcher.sizes) == [(1, 1), (2, 2)]
    monkeypatch.setattr(type(opened.model), "generate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        batcher.ask(Request((1,), None, 1)).result(timeout=60)
    batcher.close()


def test_a_rehearsal_loads_all_and_does_not_listen(runs, monkeypatch):
    monkeypatch.setattr("uvicorn.run", None)
    done = CliRunner().invoke(app, ["serve", str(runs["lora"]), f"{runs['ia3']}=ia3", "--port", "1", "--dry-run"])
    assert done.exit_code == 0 and done.output.startswith("would serve ") and done.output.endswith("ia3 at http://127.0.0.1:1\n")


def test_a_classifier_is_not_served(runs):
    with pytest.raises(vn.CapabilityError, match="does not generate text"):
        create_app(open_folder(runs["bert"]))
