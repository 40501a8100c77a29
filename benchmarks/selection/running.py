"""Jobs over processes and sessions: who does which, lines that add up, what is done already."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def lines_of(*places: Path) -> list[Line]:
    """The lines of files, and of all *.jsonl in folders."""
    files = [f for p in places for f in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p] if p.exists() else [])]
    out = []
    for text in dict.fromkeys(line for f in dict.fromkeys(f.resolve() for f in files) for line in f.read_text().splitlines()):
        try:
            out.append(json.loads(text))
        except ValueError:  # the last line of a run that was cut off
            continue
    return out


def write(path: Path, lines: Iterable[Line]) -> None:
    """Add lines in one write, after the end of a line that was cut off."""
    text = "".join(json.dumps(x) + "\n" for x in lines)
    with path.open("a+b") as f:
        torn = f.tell() > 0 and (f.seek(-1, 2), f.read(1))[1] != b"\n"
        f.write((("\n" if torn else "") + text).encode())


def setting_of(**values: Any) -> Line:
    """What cells must share to stand in one table, with a short name for it."""
    return {"kind": "setting", "setting": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8], **values}


def part_of(text: str) -> tuple[int, int]:
    """(which, of how many) from 'i/n', counted from 1."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise SystemExit(f"--part {text}: give i/n with i from 1 to n, as 1/2")
    return int(i), int(n)


def todo(cells: list[tuple[Any, ...]], rows: Iterable[str], lines: list[Line], setting: str, part: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Those of this part's cells that lack one of `rows`. The parts are fixed by the whole grid, so that what a session has done
    does not move a cell from one part to another."""
    have: dict[Any, set[str]] = {}
    for x in lines:
        if x["kind"] == "cell" and x["setting"] == setting:
            have.setdefault((x["task"], x["K"], x["seed"]), set()).add(x["row"])
    return [c for c in cells[part[0] - 1 :: part[1]] if not set(rows) <= have.get(c, set())]


def work(do: Callable[..., list[Line]], args: Any, jobs: Any, number: int) -> None:
    """Take jobs until there are none, or until the time is up; write each one's lines as it is finished."""
    import torch

    torch.set_num_threads(max(1, args.threads))
    torch.set_float32_matmul_precision("high")
    while time.time() < args.until:
        try:
            job = jobs.get(timeout=1)
        except Exception:  # empty
            return
        begin = time.perf_counter()
        try:
            found = do(args, *job)
        except Exception as e:
            found = [{"kind": "error", "job": list(map(str, job)), "error": f"{type(e).__name__}: {e}"}]
        write(args.out, found)
        note = f" {found[0]['error']}" if found[0]["kind"] == "error" else ""
        print(f"[{time.time() - args.began:6.0f} s] worker {number}: {job[:3]} in {time.perf_counter() - begin:.1f} s{note}", flush=True)


def run(do: Callable[..., list[Line]], args: Any, jobs: list[Any]) -> None:
    """Do the jobs in `args.workers` processes; one works in this."""
    if not jobs:
        return
    if args.workers == 1:
        import queue

        mine: Any = queue.Queue()
        for job in jobs:
            mine.put(job)
        work(do, args, mine, 0)
        return
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    shared = context.Queue()
    for job in jobs:
        shared.put(job)
    workers = [context.Process(target=work, args=(do, args, shared, i)) for i in range(min(args.workers, len(jobs)))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
