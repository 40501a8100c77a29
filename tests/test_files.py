"""Files are written whole or not at all: on a full disk, without the right, and killed at any moment."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer as vn
from helpers import build, config_of, fresh, look, refuses, shake
from veneer.files import write_whole


@pytest.fixture(scope="module")
def base() -> Any:
    """One model for all refusals: each must leave it as it was."""
    return build()


# -- saving where one cannot ------------------------------------------------------------------------------------------
def test_saving_to_a_file_or_under_one(tmp_path: Path) -> None:
    model = build()
    vn.attach(model, vn.LoRA(2), name="a")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with refuses(vn.StoreError, "a file is where the folder should be", str(tmp_path), model=model):
            vn.save(model, path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "f" / "adapter.json").mkdir(parents=True)
    with refuses(vn.StoreError, "a folder is where the file should be", "adapter.json", model=model):
        vn.save(model, tmp_path / "f")


@pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("problem", ["ENOSPC", "EACCES", "EIO", "EROFS"])
def test_no_room_or_no_right(step: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Any) -> None:
    import errno

    model = build()
    adapter = shake(vn.attach(model, vn.LoRA(2), name="a"))
    adapter.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    shake(adapter)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(getattr(errno, problem), os.strerror(getattr(errno, problem)))

    where = tmp_path / "a"
    if step == "mkdir":
        where = tmp_path / "new"
        monkeypatch.setattr(os, "mkdir", fail)
    elif step == "write":

        class Full:
            def __init__(self, handle: int, mode: str) -> None:
                self.handle = handle

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                os.close(self.handle)

            write = fail

        monkeypatch.setattr(os, "fdopen", Full)
    else:
        monkeypatch.setattr(os, step, fail)
    with refuses(vn.StoreError, "cannot write", str(where.name)):
        adapter.save(where)
    monkeypatch.undo()
    if step != "mkdir":
        assert {p.name: p.read_bytes() for p in where.iterdir()} == before
        vn.load(base, where)
        vn.detach(base)


def test_write_whole_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "x" / "f", b"old")
    for n in range(8):
        with pytest.raises(KeyboardInterrupt), Interrupted(monkeypatch, n, cleanup=True):
            write_whole(tmp_path / "x" / "f", b"new and longer")
        assert (tmp_path / "x" / "f").read_bytes() in (b"old", b"new and longer")
        assert len(list((tmp_path / "x").iterdir())) == 1
        write_whole(tmp_path / "x" / "f", b"old")
        if n > 3 and not Interrupted.reached:
            break


# -- killed while saving ----------------------------------------------------------------------------------------------
STEPS = ("mkdir", "open", "fdopen", "fsync", "close", "chmod", "replace", "scandir", "unlink")


class Interrupted:
    """Within the block the n-th step on the file system is not taken, and, unless `cleanup`, none after it."""

    reached = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, cleanup: bool = False) -> None:
        self.patch, self.left, self.cleanup = monkeypatch, n, cleanup

    def __enter__(self) -> None:
        self.dead, Interrupted.reached = False, False
        for step in STEPS:
            self.patch.setattr(os, step, self.wrap(step, getattr(os, step)))

    def wrap(self, step: str, own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead and not self.cleanup:
                raise KeyboardInterrupt
            if self.left == 0 and not self.dead:
                self.dead = Interrupted.reached = True
                raise KeyboardInterrupt
            self.left -= 1
            return own(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        if not self.dead:
            raise KeyboardInterrupt  # the block came to its end


def test_any_step_may_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh()
    adapter = shake(vn.attach(model, vn.LoRA(2), name="a"), 1)
    old = copy.deepcopy([p.detach() for p in adapter.parameters()])
    adapter.save(tmp_path / "old")
    states = [look(model, inputs)]
    shake(adapter, 2)
    states.append(look(model, inputs))
    new = copy.deepcopy([p.detach() for p in adapter.parameters()])
    got, n = set(), 0
    while True:
        path = tmp_path / str(n)
        with torch.no_grad():
            for p, v in zip(adapter.parameters(), old, strict=True):
                p.copy_(v)
        adapter.save(path)
        with torch.no_grad():
            for p, v in zip(adapter.parameters(), new, strict=True):
                p.copy_(v)
        with pytest.raises(KeyboardInterrupt), Interrupted(monkeypatch, n):
            adapter.save(path)
        other = build()
        vn.load(other, path)
        found = look(other, inputs)
        got.add(next(i for i, s in enumerate(states) if torch.equal(found, s)))
        adapter.save(path)  # whoever comes after is not disturbed
        vn.load(build(), path)
        if not Interrupted.reached:
            break
        n += 1
    assert n >= 12 and got == {0, 1}


def test_killed_while_saving(tmp_path: Path) -> None:
    """A real process that saves one of two adapters in a loop is killed at random moments."""
    program = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2].split(":")
import veneer as vn
from helpers import build, shake
import os
model = build()
torch.manual_seed(0)
one, two = (shake(vn.attach(model, vn.LoRA(2, at="linear"), name=n), i) for i, n in enumerate(("one", "two")))
vn.save(model, sys.argv[1], name="one")
print("ready", flush=True)
for line in sys.stdin:  # a forked child for each kill: starting Python anew would take seconds
    child = os.fork()
    if child == 0:
        while True:
            vn.save(model, sys.argv[1], name="two")
            vn.save(model, sys.argv[1], name="one")
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""
    where = ":".join((str(Path(vn.__file__).parents[1]), str(Path(__file__).parent)))
    args = [sys.executable, "-c", program, str(tmp_path), where]
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    model, dice, got = build(), random.Random(1), []
    torch.manual_seed(0)
    two = [shake(vn.attach(model, vn.LoRA(2, at="linear"), name=n), i) for i, n in enumerate(("one", "two"))]
    known = {a.name: {k: v.detach().clone() for k, v in a.named_parameters()} for a in two}
    vn.detach(model)
    import signal
    import time

    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(dice.random() * 0.06)
            vn.load(model, tmp_path, name="y")  # while it saves: what was there before, or what is there now
            vn.detach(model)
            time.sleep(dice.random() * 0.06)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            adapter = vn.load(model, tmp_path, name="x")
            name = config_of(tmp_path)["name"]
            own = dict(adapter.named_parameters())
            assert all(torch.equal(own[k], v) for k, v in known[name].items())
            got.append(name)
            vn.detach(model)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert len(got) == 20
