"""Tables: every source and every format read the same, and the errors that name their rows."""

from __future__ import annotations

import json

import pytest

import veneer as vn
from veneer.data.builtin import table
from veneer.data.formats import FORMATS
from veneer.data.tables import read_table


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


def test_every_source_gives_the_same_table(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    rows = [{"sentence": f"text, {i}", "label": "yn"[i % 2]} for i in range(4)]
    files = [
        write(tmp_path / "a.csv", "sentence,label\n" + "".join(f'"{r["sentence"]}",{r["label"]}\n' for r in rows)),
        write(tmp_path / "b.csv", "\ufeffsentence,label\n" + "".join(f'"{r["sentence"]}",{r["label"]}\n' for r in rows)),
        write(tmp_path / "a.tsv", "sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows)),
        write(tmp_path / "a.json", json.dumps(rows)),
        jsonl(tmp_path / "a.jsonl", *rows),
        *(str(tmp_path / n) for n in ("a.parquet", "saved", "splits")),
    ]
    data = Dataset.from_list(rows)
    data.to_parquet(files[-3])
    classes = Features({"sentence": Value("string"), "label": ClassLabel(names=["n", "y"])})
    numbered = Dataset.from_list([{"sentence": r["sentence"], "label": "ny".index(r["label"])} for r in rows], features=classes)
    numbered.save_to_disk(files[-2])
    DatasetDict({"train": numbered, "test": numbered}).save_to_disk(files[-1])
    for name in files:
        found = read_table(name)
        assert found.texts == [r["sentence"] for r in rows] and found.labels == [r["label"] for r in rows], name
        assert found.format == "text-label" and len(found.places) == 4
    with pytest.raises(vn.DataError, match="no split 'dev'.*'test'"):
        read_table(files[-1], split="dev")


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = {
    "text-label": ({"tweet": "a", "sentiment": "x"}, {"text": "a", "label": "x"}),
    "text-pair": ({"premise": "a", "hypothesis": "b", "label": "x"}, {"text": "a", "pair": "b", "label": "x"}),
    "alpaca": (
        {"instruction": "say", "input": "it", "output": "so"},
        {"messages": [{"role": "user", "content": "say\n\nit"}, {"role": "assistant", "content": "so"}]},
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, {"messages": CONVERSATION}),
    "messages": ({"messages": CONVERSATION}, {"messages": CONVERSATION}),
    "prompt-completion": ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
    "text": ({"content": "a"}, {"text": "a"}),
    "preference": ({"question": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "tokens": ({"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}, {"tokens": ["a", "b"], "tags": ["O", "B-X"]}),
    "text-to-text": ({"article": "a", "summary": "b"}, {"source": "a", "target": "b"}),
    "translation": ({"translation": {"en": "a", "fr": "b"}}, {"source": "a", "target": "b"}),
    "pair": ({"anchor": "a", "positive": "b"}, {"text": "a", "pair": "b"}),
    "choices": ({"question": "a", "options": ["b", "c"], "label": "1"}, {"prompt": "a", "choices": ["b", "c"], "label": "1"}),
}


def test_every_format_is_found_and_named(tmp_path):
    assert set(ROWS) | {"image", "audio"} == set(FORMATS)
    for name, (row, wanted) in ROWS.items():
        found = read_table(jsonl(tmp_path / "a.jsonl", row), formats=FORMATS)
        assert (found.format, found.rows) == (name, [wanted]), name


def test_folders_and_lists_of_pictures_and_sounds(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.JPG", "dog/notes.txt"):
        write(tmp_path / "pets" / name, "x")
    found = read_table(str(tmp_path / "pets"), formats=("image",))
    assert [r["label"] for r in found.rows] == ["cat", "cat", "dog"] and found.rows[2]["image"]["path"].endswith("dog/1.JPG")
    write(tmp_path / "a.csv", "file_name,label\npets/cat/1.png,cat\npets/cat/9.png,cat\n")
    with pytest.raises(vn.DataError, match="line 3.*|no file.*9.png"):
        read_table(str(tmp_path / "a.csv"), formats=("audio", "image"))
    write(tmp_path / "empty" / "x.bin", "x")
    with pytest.raises(vn.DataError, match="holds no dataset"):
        read_table(str(tmp_path / "empty"))


def test_a_saved_dataset_without_rows(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": [], "label": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(vn.DataError, match="without rows.*none"):
        read_table(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("a.csv", "text,label\nfine,x\n  ,y\n", {}, "line 3"),
        ("a.csv", "text,label\nfine,x\nfine,\n", {}, "line 3"),
        ("a.csv", "text,label\nfine,x\nfine,y,z\n", {}, "line 3"),
        ("a.csv", "text,label\n", {}, "no rows"),
        ("a.csv", "", {}, "no rows"),
        ("a.csv", "text,text\na,b\n", {}, "two columns are called 'text'.*Rename"),
        ("a.csv", 'text,label\n"fine\nstill",x\n"open,y\nlast,x\n', {}, "a quote is not closed.*line 4.*data.quotes=false"),
        ("a.csv", 'text,label\n"said "no" to it",x\n', {}, "something stands after it.*line 2"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', {}, "column 'label' is empty.*line 1"),
        ("a.jsonl", '{"text": "a", "label": ["x", null]}\n', {}, "column 'label' is empty.*line 1"),
        ("a.jsonl", '{"text": "a", "label": {"x": 1}}\n', {}, "holds no label but.*line 1"),
        ("a.jsonl", '{"text": "a", "label": "x"},\n', {}, "not JSON.*line 1.*no comma after it"),
        ("a.json", '[{"text": "a", "label": "x"},\n {"text": "b", "label": "y"},\n]', {}, "not JSON.*line 3"),
        ("a.json", "", {}, "no rows"),
        ("a.csv", "words,label\nfine,x\n", {}, "no column looks like the text.*columns: words, label"),
        ("a.json", '{"data": [{"text": "a", "label": "x"}]}', {}, "no column looks like the text.*the list in 'data'"),
        ("a.csv", "text,label\nfine,x\n", {"text": "txt"}, "Did you mean 'text'"),
        ("a.csv", "text,label\nfine,x\n", {"format": "alpacca"}, "Did you mean 'alpaca'"),
        ("a.csv", "text,label\nfine,x\n", {"format": "alpaca"}, "does not take alpaca"),
        ("a.csv", "text,label\nfine,x\n", {"columns": {"txt": "text"}}, "no field 'txt'.*Did you mean 'text'"),
        ("a.csv", "instruction,output\nfine,x\n", {}, "looks like alpaca, which this task does not take"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": 3, "label": "y"}\n', {}, "line 2"),
        ("a.jsonl", '{"text": "a"\n', {}, "line 1.*|not JSON"),
        ("a.json", '{"text": "a"', {}, "not JSON"),
        ("a.jsonl", "[1]\n", {}, "line 1"),
        ("a.parquet", "no", {}, "not a parquet file"),
        ("a.docx", "hello", {}, "'.docx'"),
        ("m.jsonl", '{"messages": [{"role": "boss", "content": "x"}]}\n', {"formats": ["messages"]}, "the role 'boss'.*line 1"),
        ("m.jsonl", '{"messages": [{"role": "user", "content": 1}]}\n', {"formats": ["messages"]}, "message 1.*holds no text"),
        ("t.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}\n', {"formats": ["tokens"]}, "1 tokens and 2 tags"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, options, says):
    path = write(tmp_path / name, text)
    with pytest.raises(vn.VeneerError, match=says) as e:
        read_table(path, **options)
    assert name in str(e.value) or "data." in str(e.value)


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n{"text": " ", "label": "x"}\n{"text": "b", "label": "y"}\n')
    found = read_table(path, on_error="skip")
    assert found.texts == ["a", "b"] and [p.rpartition(" ")[2] for p, _ in found.skipped] == ["2", "3"] and found.place(1).endswith("line 4")
    assert "not JSON" in found.skipped[0][1] and "holds no text" in found.skipped[1][1]
    with pytest.raises(vn.DataError, match="no rows; 1 were skipped, the first for: column"):
        read_table(write(tmp_path / "b.jsonl", '{"text": " ", "label": "x"}\n'), on_error="skip")


def test_encodings_and_missing_files(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\ncafé,x\nthé,y\n", "latin-1")
    with pytest.raises(vn.DataError, match="not utf-8.*latin-1"):
        read_table(path)
    assert read_table(path, encoding="latin-1").texts == ["café", "thé"]
    with pytest.raises(vn.ConfigError, match="encoding"):
        read_table(path, encoding="latin-99")
    with pytest.raises(vn.DataError, match="no such file"):
        read_table(str(tmp_path / "b.csv"))


def test_how_a_file_is_written_makes_no_difference(tmp_path):
    """Separators, marks, line ends, compression, one list or a mapping a line: what users' programs export."""
    import bz2
    import gzip
    import lzma

    rows = [{"text": f"nó, {i}", "label": "yn"[i % 2]} for i in range(4)]
    plain = "text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows)
    by_line = "".join(json.dumps(r) + "\n" for r in rows)
    files = {
        "semicolon.csv": plain.replace('",', '";').replace("text,", "text;").encode(), "bar.csv": plain.replace('",', '"|').replace("text,", "text|").encode(),
        "tabs.csv": plain.replace('",', '"\t').replace("text,", "text\t").encode(), "commas.tsv": plain.encode(),
        "windows.csv": plain.replace("\n", "\r\n").encode(),
        "old mac.csv": plain.replace("\n", "\r").encode(), "spaces.csv": plain.replace("text,label", " text , label ").encode(),
        "index.csv": plain.replace("text,", ",text,").replace('\n"', '\n0,"').encode(), "ends.csv": plain.replace("y\n", "y,\n").encode(),
        "blank.csv": plain.replace("\n", "\n\n").encode(), "16.csv": plain.encode("utf-16"), "32.csv": plain.encode("utf-32"),
        "a.csv.gz": gzip.compress(plain.encode()),
        "a.csv.bz2": bz2.compress(plain.encode()), "a.JSONL.xz": lzma.compress(by_line.encode()), "16.jsonl": by_line.encode("utf-16"),
        "lines.json": by_line.encode(), "list.jsonl": json.dumps(rows, indent=1).encode(), "ünï 数据.json": json.dumps(rows, ensure_ascii=False).encode(),
        "16.json": json.dumps(rows, ensure_ascii=False).encode("utf-16"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = read_table(str(tmp_path / name))
        assert found.texts == [r["text"] for r in rows] and found.labels == [r["label"] for r in rows], name
    (tmp_path / "cut.csv.gz").write_bytes(files["a.csv.gz"][:-12])
    with pytest.raises(vn.DataError, match="cannot be read.*cut.csv.gz"):
        read_table(str(tmp_path / "cut.csv.gz"))


def test_quotes_that_are_letters(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Never closed\tx\n6" wide\ty\n')
    assert read_table(path, quotes=False).texts == ['"Never closed', '6" wide']
    found = read_table(write(tmp_path / "b.csv", 'text,label\na,x\n"b" c,y\n"d\nd",x\n'), on_error="skip")
    assert found.texts == ["a", "d\nd"] and found.skipped[0][0].endswith("line 3") and found.place(1).endswith("line 4")


def test_a_whole_number_is_one_label_however_it_is_held(tmp_path):
    found = read_table(jsonl(tmp_path / "a.jsonl", *({"text": "a", "label": v} for v in (1, 1.0, "1", 2.5, True))))
    assert found.labels == ["1", "1", "1", "2.5", "True"]


def test_the_line_of_a_byte_that_is_not_in_the_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n" + b"a longer text than most,x\n" * 2000 + b"caf\xe9,y\n")
    with pytest.raises(vn.DataError, match="byte 0xe9 .*line 2002.*latin-1"):
        read_table(str(tmp_path / "a.csv"))


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
