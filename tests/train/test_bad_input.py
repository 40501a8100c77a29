"""What a user may get wrong: each a clear error or a stated skip, and nothing is written."""

from __future__ import annotations

import json
import os

import pytest
import transformers as tf
import yaml

import veneer as vn
from bases import example
from veneer.train.config import load_config, make_config
from veneer.train.prepare import prepare
from veneer.train.run import read_run, run


def lines(*rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def say(content):
    return {"role": "assistant", "content": content}


ASK = {"role": "user", "content": "hi"}
FINE = [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(10)]
CASES = {
    "a column is missing": ("classify", "a.jsonl", lines({"words": "a", "label": "x"}), {}, "no column looks like the text.*line 1.*columns: words, label"),
    "an empty file": ("classify", "a.csv", "", {}, "there are no rows.*a.csv"),
    "a heading alone": ("chat", "a.csv", "messages\n", {}, "there are no rows.*a.csv"),
    "one class": ("classify", "a.csv", "text,label\na,x\nb,x\nc,x\n", {}, "only one label, 'x'"),
    "too few rows": ("classify", "a.csv", "text,label\na,x\nb,y\n", {"eval_rows": 2}, "2 rows, too few to hold 2 back"),
    "a list for one class": ("classify", "a.jsonl", lines(*FINE, {"text": "b", "label": ["x", "y"]}), {}, "label is a list.*line 11.*multi-label"),
    "no number": ("regression", "a.csv", "text,label\na,1\nb,2\nc,nan\nd,4\n", {"on_error": "stop"}, "'nan' is not finite.*line 4"),
    "no answer": (
        "chat", "a.jsonl", lines({"messages": [ASK, say("a")]}, {"messages": [ASK]}), {}, "no token of it is learnt: the assistant says nothing.*line 2",
    ),
    "an answer cut off": (
        "chat", "a.jsonl", lines({"messages": [ASK, say("a")]}, {"messages": [{"role": "user", "content": "hi " * 300}, say("a")]}), {},
        "its answer begins after token 128, where it is cut.*line 2",
    ),
    "the same answer twice": ("dpo", "a.jsonl", lines(*[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2), {}, "rejected answer are the same.*line"),
    "a prompt too long": ("dpo", "a.jsonl", lines(*[{"prompt": "a " * 300, "chosen": "b", "rejected": "c"}] * 2), {}, "the prompt alone has 30[0-9] tokens"),
    "a score beyond cosines": ("embeddings", "a.jsonl", lines(*[{"sentence1": "a", "sentence2": "b", "score": 3}] * 2), {}, "not within -1 to 1.*line"),
    "tags that do not fit": ("tokens", "a.jsonl", lines({"tokens": ["a", "b"], "tags": ["O"]}), {}, "2 tokens and 1 tags.*line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_named_and_nothing_is_written(small, tmp_path, case):
    name, file, text, options, says = CASES[case]
    (tmp_path / file).write_text(text)
    settings = example(name, *small, tmp_path / "run")
    settings["data"] = {"train": str(tmp_path / file), "eval_rows": 1} | options
    with pytest.raises(vn.DataError, match=says):
        run(make_config(settings), quiet=True)
    assert not (tmp_path / "run").exists()


def test_labels_unseen_in_training_and_rows_that_are_skipped(small, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*FINE, "{", {"text": "", "label": "x"}))
    (tmp_path / "b.jsonl").write_text(lines({"text": "b", "label": "z"}, {"text": "b", "label": "x"}))
    settings = example("classify", *small, tmp_path / "run")
    settings["data"] = {"train": str(tmp_path / "a.jsonl"), "eval": str(tmp_path / "b.jsonl"), "on_error": "skip"}
    with pytest.raises(vn.DataError, match="labels that training never sees: z .*b.jsonl"):
        prepare(make_config(settings))
    settings["data"]["eval"] = None
    found = prepare(make_config(settings)).counts()
    assert (found["train"]["rows"], found["eval"]["rows"], found["train"]["skipped"]) == (9, 1, 2)
    assert "not JSON" in found["train"]["reasons"][0] and "line 11" in found["train"]["reasons"][0]


def test_one_class_that_is_left_when_rows_are_skipped(small, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*[{"text": f"a{i}", "label": "x"} for i in range(9)], {"text": "b", "label": ["y"]}, {"text": "c", "label": ["z"]}))
    settings = example("classify", *small, tmp_path / "run")
    settings["data"] = {"train": str(tmp_path / "a.jsonl"), "eval_rows": 1, "on_error": "skip"}
    with pytest.raises(vn.DataError, match="only one label, 'x'"):
        prepare(make_config(settings))


def test_rows_for_evaluation_are_of_the_same_kind(small, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*FINE))
    (tmp_path / "b.jsonl").write_text(lines(*({"sentence1": r["text"], "sentence2": "b", "label": r["label"]} for r in FINE)))
    (tmp_path / "c.jsonl").write_text(lines(*({"review": r["text"], "class": r["label"]} for r in FINE)))
    settings = example("classify", *small, tmp_path / "run")
    for name in "bc":
        settings["data"] = {"train": str(tmp_path / "a.jsonl"), "eval": str(tmp_path / f"{name}.jsonl")}
        if name == "c":  # other names for the same
            assert len(prepare(make_config(settings)).evaluation) == 10
            continue
        with pytest.raises(vn.DataError, match="for evaluation are text-pair, and those for training text-label.*b.jsonl"):
            prepare(make_config(settings))


def test_a_dry_run_refuses_what_the_run_would_and_counts_labels_that_look_alike(small, tmp_path):
    from typer.testing import CliRunner

    from veneer.cli import app

    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"a{i},{['yes', 'Yes', '1', '1.0', 'no'][i % 5]}\n" for i in range(20)))
    settings = example("classify", *small, tmp_path / "run", plan="lora")
    settings["data"] = {"train": str(tmp_path / "a.csv"), "eval_rows": 2}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    command = ["train", str(tmp_path / "c.json"), "--dry-run"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert done.exit_code == 0 and "'yes' and 'Yes' are counted as different labels" in done.output and "'1.0' are counted" in done.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for change, says in (
        (f"output={tmp_path / 'full'}", "not empty and holds no run"),
        ("early_stopping=2", "needs evaluations"),
        ("report_to=wandbb", "no tracker"),
    ):
        done = CliRunner().invoke(app, [*command, change, "choose_best=false"])
        assert isinstance(done.exception, vn.ConfigError) and says in str(done.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "c.json", "full"]


def test_a_label_that_is_drawn_for_evaluation_alone_is_left_out(small, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*[{"tokens": ["a", "b"], "tags": ["O", f"B-{i}"]} for i in range(12)], *[{"tokens": ["a"], "tags": ["O"]}] * 12))
    settings = example("tokens", *small, tmp_path / "run")
    settings["data"] = {"train": str(tmp_path / "a.jsonl"), "eval_rows": 12}
    p = prepare(make_config(settings))
    found = p.counts()["eval"]
    assert found["rows"] + found["skipped"] == 12 and 0 < found["skipped"] < 12 and "is in no training row" in found["reasons"][0]
    assert len(p.labels) == 1 + 12 - found["skipped"]


def test_damaged_pictures_and_sounds_are_named(small, tmp_path):
    for name, ending in (("images", "png"), ("sounds", "wav")):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(2):
                (tmp_path / name / label / f"{i}.{ending}").write_bytes(b"nothing of the kind")
        settings = example(name, *small, tmp_path / "run")
        settings["data"] = {"train": str(tmp_path / name), "eval_rows": 1}
        with pytest.raises(vn.DataError, match=f"not a readable (image|audio).*{ending}"):
            prepare(make_config(settings))


def test_sequences_over_the_models_length_are_cut_and_counted(small, tmp_path):
    config = make_config(example("language_model", *small, tmp_path / "run", max_length=16, plan=[{"method": "lora"}, {"method": "prompt", "length": 4}]))
    p = prepare(config)
    assert p.encoded[0].cut > 0 and max(len(ids) for ids in p.train["input_ids"]) == 16
    p = prepare(config.model_copy(update={"max_length": 10_000}))
    assert p.task.longest == 256 - 4 and p.encoded[0].cut == 0  # the model's positions, and the prompt takes four


def test_a_template_without_roles_and_a_model_without_a_template(small, tmp_path):
    (tmp_path / "flat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(vn.ConfigError, match="does not show roles"):
        prepare(make_config(example("chat", *small, tmp_path / "run", chat_template=str(tmp_path / "flat.jinja"))))
    (tmp_path / "cut.jinja").write_text("{% for m in messages %}\n{{ m['role'] }}{% endif %}")
    (tmp_path / "old.jinja").write_bytes("{# für #}".encode("latin-1"))
    for name, says in (("cut", "the chat template is broken.*line 2.*chatml"), ("old", "old.jinja' cannot be read as UTF-8")):
        with pytest.raises(vn.ConfigError, match=says):
            prepare(make_config(example("chat", *small, tmp_path / "run", chat_template=str(tmp_path / f"{name}.jinja"))))
    bare = tf.AutoTokenizer.from_pretrained(small[0] / "llama")
    bare.chat_template = None
    tf.AutoModelForCausalLM.from_pretrained(small[0] / "llama").save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    settings = example("chat", *small, tmp_path / "run", model=str(tmp_path / "bare"))
    with pytest.raises(vn.ConfigError, match="no chat template.*chat_template=chatml"):
        prepare(make_config(settings))
    assert prepare(make_config(settings | {"chat_template": "chatml"})).train


def test_configurations(small, tmp_path):
    settings = example("classify", *small, tmp_path / "run")
    for change, says in (
        ({"learning_rat": 1}, "no key 'learning_rat'.*Did you mean 'learning_rate'"),
        ({"lr": 1}, "no key 'lr'.*called 'learning_rate' here"),
        ({"per_device_train_batch_size": 4}, "called 'batch_size' here"),
        ({"data": {"train": "a", "limits": 3}}, "no key 'data.limits'.*'limit'"),
        ({"data": {}}, "the key 'data.train' is missing"),
        ({"version": 0}, "an old form of configuration: version 0, and 1 is read.*veneer init"),
        ({"version": "2"}, "another form"),
        ({"task": "text-classificatoin"}, "task cannot be 'text-classificatoin'.*Did you mean 'text-classification'"),
        ({"packing": True}, "text-classification has no rows that could be packed"),
        ({"chat_template": "chatml"}, "text-classification has no use for it.*chat_template.*for chat, dpo"),
        ({"loss_on": "all"}, "no use for it.*loss_on"),
        ({"seed": -1}, "seed: input should be greater"),
        ({"data": 3}, "data holds keys of its own, and this is 3.*data.train="),
        ({"model": str(small[0] / "brt")}, "there is no such folder.*Did you mean 'bert'"),
        ({"task": "causal-lm", "plan": "lora"}, "BertLMHeadModel sees the tokens that it is to predict.*masked-lm"),
        ({"model": str(small[0])}, "the model cannot be loaded.*text-classification"),
    ):
        with pytest.raises(vn.ConfigError, match=says):
            prepare(make_config(settings | change))
    (tmp_path / "c.yaml").write_text("a: [1\n")
    (tmp_path / "t.yaml").write_text("seed: 1\ndata: {train: a}\nseed: 2\n")
    (tmp_path / "l.yaml").write_bytes("output: rün\n".encode("latin-1"))
    (tmp_path / "c.json").write_text("{,}")
    for path, says in (
        (tmp_path / "c.yaml", "not YAML"),
        (tmp_path / "t.yaml", "'seed' stands twice.*line 3"),
        (tmp_path / "l.yaml", "not YAML"),
        (tmp_path / "c.json", "not JSON"),
        (tmp_path, "this is a folder"),
        (tmp_path / "d.yaml", "no such file"),
    ):
        with pytest.raises(vn.ConfigError, match=says) as e:
            load_config(path)
        assert "\n" not in str(e.value)


def test_a_configuration_may_be_json_or_come_from_windows(small, tmp_path):
    settings = example("classify", *small, tmp_path / "rün 😀")
    text = yaml.safe_dump(settings, allow_unicode=True)
    for name, content in (
        ("a.json", json.dumps(settings).encode()), ("b.json", b"\xef\xbb\xbf" + json.dumps(settings, ensure_ascii=False).encode()),
        ("a.yaml", text.replace("\n", "\r\n").encode()), ("b.yaml", b"\xef\xbb\xbf" + text.encode()), ("c.yaml", text.encode("utf-16")),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert load_config(tmp_path / name) == make_config(settings), name


def test_a_run_folder_that_is_not_one_and_a_disk_that_is_read_only(small, tmp_path):
    settings = example("classify", *small, tmp_path / "run")
    (tmp_path / "run").write_text("mine")
    with pytest.raises(vn.ConfigError, match="a file is where the run's folder should be"):
        run(make_config(settings), quiet=True)
    with pytest.raises(vn.ConfigError, match="not a run"):
        read_run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"
    with pytest.raises(vn.StoreError, match="a file is where the folder should be"):
        run(make_config(settings | {"output": os.devnull + "/run"}), quiet=True)


def test_preview_shows_what_a_run_would_see_and_writes_nothing(small, tmp_path):
    from typer.testing import CliRunner

    from veneer.cli import app

    for name, wanted in (
        ("chat", ["⟦negative", "messages: 24 training and 8 evaluation rows", "rows, ", "% filled", "ffn.down", "learning rate 0.0005 (lora: UniPELT"]),
        ("tokens", ["/B-NAME", "O 2", "B-NUM", "look at macro-F1"]),
        ("regression", ["→ -1.0", "rows are skipped; the first: the label 'much' is no number", "prefix gate"]),
        ("dpo", ["⟦\n+ negative", "- no idea"]),
        ("images", [".png⟦ → ", "labels"]),
        ("sounds", [" s, median ", " cut to 0.4 s; raise max_seconds if"]),
    ):
        settings = example(name, *small, tmp_path / "run")
        if name == "regression":
            settings["data"].pop("limit")
        if name == "sounds":
            settings["max_seconds"] = 0.4
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        done = CliRunner().invoke(app, ["preview", str(tmp_path / "c.yaml"), "seed=1" if name == "images" else "seed=0"], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.exception
        text = done.output.replace("│ ", "").replace(" │", "").replace("  ", "")
        for words in (*wanted, "about", "MiB", "s a step", f"would write {tmp_path / 'run'}"):
            assert words.replace("\n", "") in text.replace("\n", ""), (name, words, done.output)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), "--dry-run", "learning_rate=1e-2"], env={"COLUMNS": "300"})
    assert done.exit_code == 0 and "learning rate 0.01 (the configuration)" in done.output
    assert not (tmp_path / "run").exists()
