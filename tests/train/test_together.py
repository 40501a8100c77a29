"""Two processes that train together: they decide alike, one writes, and what they score is what one process scores."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer as vn
from bases import example
from veneer.eval.own import own
from veneer.serve.predict import Predictor
from veneer.train.config import make_config
from veneer.train.run import read_run, run

ROWS = {"limit": 32, "eval_rows": 7}  # evaluated by 2, so that one process has a batch more, and a last one of a single row


def settings(small, out):
    found = example("classify", *small, out, max_steps=4, batch_size=4, eval_batch_size=2, checkpoint_every=2, choose_best=False)
    return found | {"data": found["data"] | ROWS}


def start(config, root, what):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_processes.py")), json.dumps(config), str(root), what], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def weights(folder):
    return load_file(next((folder / "adapter").glob("adapter-*.safetensors")))


@pytest.fixture(scope="module")
def both(small, tmp_path_factory):
    """(folder of runs, what each process said): one run is killed, and gone on with; see two_processes.py."""
    root = tmp_path_factory.mktemp("together")
    config = settings(small, root)
    killed = start(config, root, "killed")
    deadline = time.monotonic() + 200
    while not (root / "killed" / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
        assert all(p.poll() is None for p in killed) and time.monotonic() < deadline, [p.communicate() for p in killed if p.poll() is not None]
        time.sleep(0.05)
    for p in killed:
        p.send_signal(signal.SIGKILL)
        p.communicate()
    assert read_run(root / "killed")["result"] is None
    started = start(config, root, "all")
    ends = [p.communicate(timeout=400) for p in started]
    assert [p.returncode for p in started] == [0, 0], ends
    return root, [json.loads(said.splitlines()[-1]) for said, _ in ends]


def test_the_first_writes_the_folder_and_both_score_what_one_process_scores(both):
    root, (first, second) = both
    assert first["wrote"] and not second["wrote"]
    assert first["whole"] == second["whole"] == read_run(root / "whole")["result"]["metrics"]
    alone = {s.metric: s.value for s in own(Predictor(root / "whole"))}
    assert alone.keys() == first["whole"].keys() and all(abs(alone[k] - first["whole"][k]) < 1e-6 for k in alone)
    assert sum(map(sum, json.loads((root / "whole" / "evaluation.json").read_text())["counts"])) == ROWS["eval_rows"]
    predictor = Predictor(root / "whole")
    batch = predictor.tokenizer([r["text"] for r in rows_of(predictor)], return_tensors="pt", padding=True, truncation=True, max_length=128)
    gates = {(r["method"], r["layer"]): r["mean"] for r in vn.gates(predictor.model, [{k: batch[k] for k in ("input_ids", "attention_mask")}]).rows}
    found = {(r["method"], r["layer"]): r["mean"] for r in json.loads((root / "whole" / "gates.json").read_text())["rows"]}
    assert gates.keys() == found.keys() and all(abs(gates[k] - found[k]) < 1e-5 for k in gates)


def rows_of(predictor):
    from veneer.train.prepare import tables

    return tables(predictor.config)[1].rows


@pytest.mark.parametrize("name", ["killed", "pressed", "evaluated"])
def test_what_disturbs_one_process_changes_nothing_in_the_end(name, both):
    """Killed and gone on with; Ctrl-C in one process, and gone on with; too little memory for an evaluation in one process."""
    root, said = both
    a, b = weights(root / "whole"), weights(root / name)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(s["checkpoints"] == ["checkpoint-2"] for s in said)
    assert all(s.get(name, s["whole"]) == pytest.approx(s["whole"], rel=1e-6) for s in said)


def test_memory_that_is_too_small_in_one_process_divides_the_batch_in_both(both):
    root, _ = both
    assert [read_run(root / n)["batch"]["micro"] for n in ("whole", "crowded")] == [4, 2]
    assert read_run(root / "crowded")["processes"] == 2
    logs = [[e["loss"] for e in read_run(root / n)["result"]["log"] if "loss" in e] for n in ("whole", "crowded")]
    assert len(logs[0]) == len(logs[1]) == 4 and abs(logs[0][0] - logs[1][0]) < 0.05  # the same rows, under other dropout


def test_another_number_of_processes_is_refused(both, small):
    root, _ = both
    known = root / "crowded" / "run.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"result": None}))
    with pytest.raises(vn.ConfigError, match="begun by 2 processes, and this is 1"):
        run(make_config(settings(small, root / "crowded") | {"output": str(root / "crowded")}), quiet=True)
