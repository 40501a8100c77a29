"""Tables of text, and the errors that name their rows."""

from __future__ import annotations

import json

import pytest

import veneer as vn
from veneer.data.builtin import table
from veneer.data.tables import read_table


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_every_format_gives_the_same_table(tmp_path):
    from datasets import Dataset

    rows = [{"sentence": f"text, {i}", "label": "yn"[i % 2]} for i in range(4)]
    files = [
        write(tmp_path / "a.csv", "sentence,label\n" + "".join(f'"{r["sentence"]}",{r["label"]}\n' for r in rows)),
        write(tmp_path / "a.tsv", "sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows)),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.jsonl", "\n".join(json.dumps(r) for r in rows)),
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for name in [*files, str(tmp_path / "a.parquet")]:
        found = read_table(name)
        assert found.texts == [r["sentence"] for r in rows] and found.labels == [r["label"] for r in rows]


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("a.csv", "text,label\nfine,x\n  ,y\n", {}, "row 3"),
        ("a.csv", "text,label\nfine,x\nfine,\n", {}, "row 3"),
        ("a.csv", "text,label\nfine,x\nfine,y,z\n", {}, "line 3"),
        ("a.csv", "text,label\nfine,x\nfine,x\n", {}, "only one label"),
        ("a.csv", "text,label\n", {}, "no rows"),
        ("a.csv", "", {}, "no rows"),
        ("a.csv", "words,label\nfine,x\n", {}, "no column looks like the text"),
        ("a.csv", "text,label\nfine,x\n", {"text": "txt"}, "Did you mean 'text'"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": 3, "label": "y"}\n', {}, "row 2"),
        ("a.jsonl", '{"text": "a"\n', {}, "not JSON"),
        ("a.jsonl", "[1]\n", {}, "line 1"),
        ("a.txt", "hello", {}, "'.txt'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, options, says):
    path = write(tmp_path / name, text)
    with pytest.raises(vn.DataError, match=says.replace("'", ".").replace(".txt", "txt")) as e:
        read_table(path, **options)
    assert name in str(e.value)


def test_encodings_and_missing_files(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\ncafé,x\nthé,y\n", "latin-1")
    with pytest.raises(vn.DataError, match="not utf-8.*latin-1"):
        read_table(path)
    assert read_table(path, encoding="latin-1").texts == ["café", "thé"]
    with pytest.raises(vn.ConfigError, match="encoding"):
        read_table(path, encoding="latin-99")
    with pytest.raises(vn.DataError, match="no such file"):
        read_table(str(tmp_path / "b.csv"))


def test_split_keeps_proportions_and_repeats():
    tweets = table("tweets")
    assert len(tweets) > 38_000 and tweets.names == ["negative", "neutral", "positive"]
    a, b = tweets.split(500, 1000, seed=0)
    assert (len(a), len(b)) == (500, 1000)
    for name in tweets.names:
        share = tweets.labels.count(name) / len(tweets)
        assert abs(a.labels.count(name) / 500 - share) < 0.01 and abs(b.labels.count(name) / 1000 - share) < 0.01
    again, _ = tweets.split(500, 1000, seed=0)
    other, _ = tweets.split(500, 1000, seed=1)
    assert again.texts == a.texts and other.texts != a.texts
    with pytest.raises(vn.DataError, match="are wanted"):
        a.split(400, 200, seed=0)
