"""The same configuration with several plans and seeds: `veneer train` for each, one after the other, then `veneer compare` over the seeds.

    python examples/real/sweep.py examples/real/sounds.yaml --seeds 0 1 2 --arm lora --arm ia3 plan=ia3 --arm head plan=head

An arm is a name and what it changes, as `veneer train` takes it. Runs go to OUTPUT/NAME-SEED, where OUTPUT is the configuration's; finished
ones are left alone, so the same command goes on after a break. One process does all, since importing takes longer than a short run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from veneer.cli import app
from veneer.train.config import load_config


def veneer(*words: str) -> None:
    print("$ veneer", " ".join(f'"{w}"' if " " in w else w for w in words), flush=True)
    code = app(list(words), standalone_mode=False)
    if code:  # stopped by Ctrl-C, so the next arm is not begun
        sys.exit(code)


def finished(folder: Path) -> bool:
    return (folder / "adapter" / "adapter.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", nargs="+", action="append", required=True, metavar="NAME [KEY=VALUE …]")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="for all arms")
    args = parser.parse_args()
    root = Path(load_config(args.config, args.overrides).output)
    runs = []
    for seed in args.seeds:
        for name, *changes in args.arm:
            output = root / f"{name}-{seed}"
            runs.append(str(output))
            if not finished(output):
                veneer("train", args.config, *args.overrides, *changes, f"seed={seed}", f"output={output}")
    veneer("compare", *sorted(runs), "--over", "seed", "--page", str(root / "compare.html"))


if __name__ == "__main__":
    sys.exit(main())
