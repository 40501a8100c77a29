"""Every task's example, trained for a few steps and used: on texts, on files, and measured again."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import veneer as vn
from bases import EXAMPLES, example, make_bases, make_data
from veneer.cli import app
from veneer.eval.own import own
from veneer.serve.answers import ANSWERS
from veneer.serve.predict import Predictor
from veneer.train.config import make_config
from veneer.train.run import read_run, run
from veneer.train.tasks import TASKS

NAMES = [e.stem for e in EXAMPLES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """example -> (its run's folder, its data), trained when first asked for."""
    root = tmp_path_factory.mktemp("examples")
    bases, data = make_bases(root / "bases"), make_data(root)
    done: dict[str, Path] = {}

    def of(name):
        if name not in done:
            changes = {"learning_rate": 5e-3, "max_steps": 3}
            run(make_config(example(name, bases, data, root / "runs" / name, **changes)), quiet=True)
            done[name] = root / "runs" / name
        return done[name], read_run(done[name])["config"]["data"]["train"]

    return of


def test_every_task_has_an_answer():
    assert set(ANSWERS) == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_the_runs_own_score_comes_out_again(trained, name):
    folder, _ = trained(name)
    found = {s.metric: s.value for s in own(Predictor(folder))}
    assert found == pytest.approx(read_run(folder)["result"]["metrics"], rel=1e-4, abs=1e-6)


def test_answers_are_a_table_where_the_file_is_one(trained, tmp_path):
    folder, _ = trained("classify")
    (tmp_path / "in.csv").write_text('text\n"never, again"\n"a ""day"""\n')
    for name, between in (("out.csv", ","), ("out.tsv", "\t")):
        done = CliRunner().invoke(app, ["predict", str(folder), "--file", str(tmp_path / "in.csv"), "--out", str(tmp_path / name)])
        assert done.exit_code == 0, (done.output, done.exception)
        with open(tmp_path / name, newline="") as f:
            rows = list(csv.DictReader(f, delimiter=between))
        labels = read_run(folder)["labels"]
        assert [r["input.text"] for r in rows] == ["never, again", 'a "day"'] and all(r["label"] in labels for r in rows)
        assert all(sum(float(r[f"probabilities.{n}"]) for n in labels) == pytest.approx(1) for r in rows)


def unlabelled(source: str, to: Path, blanks: bool = False) -> tuple[str, int]:
    """The training file without what is asked for (with `blanks` in its texts), and how many rows it has; a folder of media as it is."""
    path = Path(source)
    if path.is_dir():
        return source, sum(1 for p in path.rglob("*") if p.is_file())
    gone = {"label", "tags", "completion", "target", "chosen", "rejected", "positive"}
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as f:
            rows = [{k: v for k, v in r.items() if k not in gone} for r in csv.DictReader(f)]
    else:
        rows = [{k: v for k, v in json.loads(line).items() if k not in gone} for line in path.read_text().splitlines()]
    rows = [{k: v.replace(" and ", " [MASK] ") + " [MASK]" if blanks and k == "text" else v for k, v in r.items()} for r in rows]
    to.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(to), len(rows)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "classify"])  # its data is the demo's, of 38,158 rows
def test_a_file_in_and_a_file_out(trained, tmp_path, name):
    folder, source = trained(name)
    file, count = unlabelled(source, tmp_path / "in.jsonl", name == "masked")
    done = CliRunner().invoke(app, ["predict", str(folder), "--file", file, "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"])
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == count and f"{count} answers" in done.output and all(line["input"] and len(line) > 1 for line in lines)
    # rows of a batch do not depend on each other
    predictor = Predictor(folder)
    rows = list(predictor.read(file))[:3]
    alone = [next(iter(predictor.rows([r], max_new_tokens=4))) for r in rows]
    together = list(predictor.rows(rows, max_new_tokens=4))
    for a, b in zip(alone, together, strict=True):
        for key in a:
            if key in ("probabilities", "value", "embedding"):
                numbers = [torch.tensor(list(v[key].values()) if isinstance(v[key], dict) else v[key]) for v in (a, b)]
                # wav2vec2's first normalisation runs over time, padding included
                assert torch.allclose(*numbers, atol=5e-3 if name == "sounds" else 1e-4)
            else:
                assert a[key] == b[key]


def test_answers_are_the_models_own(trained):
    folder, source = trained("tokens")
    predictor = Predictor(folder)
    [found] = predictor(["@ada counts 12 sheep"])
    words = predictor.tokenizer(["@ada counts 12 sheep".split()], is_split_into_words=True, return_tensors="pt", return_token_type_ids=False)
    best = predictor.model(**words).logits[0].argmax(-1).tolist()
    first = [words.word_ids(0).index(i) for i in range(4)]
    assert found == {"tokens": ["@ada", "counts", "12", "sheep"], "tags": [predictor.labels[best[i]] for i in first]}
    vector = Predictor(trained("embeddings")[0])(["a day", "a day", "another"])
    a, b, c = (torch.tensor(v["embedding"]) for v in vector)
    assert torch.allclose(a, b, atol=1e-5) and a.norm() == pytest.approx(1, abs=1e-4) and not torch.allclose(a, c, atol=1e-3)
    classes = Predictor(trained("classify")[0])(["what a day"])[0]
    assert list(classes["probabilities"])[0] == classes["label"] and sum(classes["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_a_chat_answers_as_in_training(trained):
    predictor = Predictor(trained("chat")[0])
    [found] = predictor(["What does this say?"], max_new_tokens=5)
    batch = predictor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does this say?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = predictor.model.generate(input_ids=batch["input_ids"], max_new_tokens=5, do_sample=False)
    assert found["text"] == predictor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    with pytest.raises(vn.DataError, match="over the model's 256.*--max-new-tokens"):
        predictor(["What does this say?"], max_new_tokens=500)


def test_from_the_shell(trained, tmp_path):
    folder = str(trained("regression")[0])
    one = CliRunner().invoke(app, ["predict", folder, "what a day"])
    assert one.output.endswith("  what a day\n") and float(one.output.split()[0]) == pytest.approx(Predictor(folder)(["what a day"])[0]["value"], abs=1e-3)
    piped = CliRunner().invoke(app, ["predict", folder], input="what a day\nnever again\n")
    assert len(piped.output.splitlines()) == 2 and piped.output.splitlines()[0].endswith("  what a day")
    measured = CliRunner().invoke(app, ["eval", folder, "--base", "--out", str(tmp_path / "s.json")], env={"COLUMNS": "160"})
    assert measured.exit_code == 0 and "pearson" in measured.output, measured.exception
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert {s["metric"] for s in scores["adapter"]} == {s["metric"] for s in scores["base"]} >= {"loss", "mae"}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "classify"])
def test_a_rehearsal_reads_all_rows_and_asks_no_model(trained, tmp_path, monkeypatch, name):
    folder, source = trained(name)
    predictor = Predictor(folder)
    file, _ = unlabelled(source, tmp_path / "in.jsonl", name == "masked")
    rows = list(predictor.read(file))
    monkeypatch.setattr(type(predictor.model), "forward", None)
    predictor.check(rows, 4)
    said = CliRunner().invoke(app, ["predict", str(folder), "--file", file, "--out", str(tmp_path / "a.jsonl"), "--dry-run"])
    assert said.exit_code == 0 and said.output == f"would answer {len(rows)} rows, and write {tmp_path / 'a.jsonl'}\n" and not (tmp_path / "a.jsonl").exists()
    said = CliRunner().invoke(app, ["eval", str(folder), source, "--out", str(tmp_path / "s.json"), "--dry-run"])
    assert said.exit_code == 0 and re.fullmatch(r"would measure [\w, /]+ on \d+ rows\n", said.output) and not (tmp_path / "s.json").exists()


def test_a_rehearsal_finds_what_answering_would(trained, tmp_path):
    folder = str(trained("chat")[0])
    said = CliRunner().invoke(app, ["predict", folder, "a word", "--max-new-tokens", "500", "--dry-run"])
    assert isinstance(said.exception, vn.DataError) and "over the model's 256" in str(said.exception)
    said = CliRunner().invoke(app, ["predict", str(trained("masked")[0]), "a word", "--dry-run"])
    assert isinstance(said.exception, vn.DataError) and "no [MASK] is in" in str(said.exception)
    said = CliRunner().invoke(app, ["eval", folder, "--generate", "--dry-run"])
    assert said.output == "would measure exact, rouge_l, chrf on 8 rows\n"


def test_mistakes_are_told(trained, tmp_path):
    folder, source = trained("tokens")
    predictor = Predictor(folder)
    with pytest.raises(vn.DataError, match="no text"):
        predictor(["  "])
    with pytest.raises(vn.DataError, match="no such file.*Nearby"):
        list(predictor.read(str(tmp_path / "none.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"tokens": ["a"]}\n{"tokens": 3}\n')
    with pytest.raises(vn.DataError, match="bad.jsonl, line 2"):
        list(predictor.read(str(tmp_path / "bad.jsonl")))
    (tmp_path / "other.jsonl").write_text('{"y": ["a"], "x": 1}\n')
    with pytest.raises(vn.DataError, match="no column looks like the tokens"):
        list(predictor.read(str(tmp_path / "other.jsonl")))
    (tmp_path / "new.jsonl").write_text('{"tokens": ["a"], "tags": ["B-NEW"]}\n')
    with pytest.raises(vn.DataError, match="labels that training never saw: B-NEW"):
        own(predictor, str(tmp_path / "new.jsonl"))
    with open(tmp_path / "new.jsonl", "a") as f:
        f.write('{"tokens": ["a"], "tags": ""}\n')
    one, two = predictor.rows(list(predictor.read(str(tmp_path / "new.jsonl"))))  # a label plays no part in an answer
    assert one == two and one["tags"][0] in predictor.labels
    (tmp_path / "none.csv").write_text("tokens\n")
    with pytest.raises(vn.DataError, match="there are no rows.*none.csv"):
        list(predictor.read(str(tmp_path / "none.csv")))
    with pytest.raises(vn.ConfigError, match="does not say what its task is"):
        Predictor(folder / "adapter")
    shutil.copytree(folder, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "adapter")
    with pytest.raises(vn.ConfigError, match="has not finished"):
        Predictor(tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text('{"config": [], "labels": []}')
    with pytest.raises(vn.ConfigError, match="not one of ours"):
        Predictor(tmp_path / "r")
    both = CliRunner().invoke(app, ["predict", str(folder), "a", "--file", "b.csv"])
    assert isinstance(both.exception, vn.ConfigError) and "both texts and a file" in str(both.exception)
