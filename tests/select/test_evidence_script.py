"""benchmarks/selection/evidence.py on a tiny base and task: its parts, its lines that add up, a run that was cut off."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import veneer as vn
from veneer.select.lanes import Candidate
from veneer.select.race import race

HERE = Path(__file__).parents[2] / "benchmarks" / "selection"
MODULES = ("evidence", "plans", "report", "running", "settling", "tasks")
TRIAL = ["--steps", "8", "--dev", "16", "--test", "20", "--wide", "64", "--sizes", "100", "--tasks", "first"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HERE))
    import evidence  # pyright: ignore[reportMissingImports]

    yield evidence
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as prepare.py writes it: the label is which half of the vocabulary the first token is from."""
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30, max_position_embeddings=16)
    save_file({k: v.bfloat16().contiguous() for k, v in BertModel(config).state_dict().items()}, root / "base.safetensors")
    (root / "config.json").write_text(config.to_json_string(use_diff=False))
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for part, n in (("pool", 120), ("dev", 16), ("test", 30)):
        ids, length = torch.randint(5, 29, (n, 8), generator=g), torch.randint(3, 9, (n,), generator=g)
        tensors |= {f"{part}.ids": ids.to(torch.uint16), f"{part}.length": length.to(torch.int16), f"{part}.labels": (ids[:, 0] > 16).to(torch.int16)}
    save_file(tensors, root / "first.safetensors")
    (root / "tasks.json").write_text(json.dumps({"first": {"labels": ["a", "b"]}}))
    return root


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, options)])
    script.main()


def test_parts_add_up_and_what_was_cut_off_is_done_again(
    script: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines"
    common = [*TRIAL, "--data", data, "--lines", lines, "--seeds", "0", "1"]
    run(script, monkeypatch, *common, "--part", "1/2")
    shown = capsys.readouterr().out
    assert "part 1 of 2: 1 cells to do, 2 in the grid" in shown and "1 cells," in shown
    first = [json.loads(x) for x in (lines / "cpu-1of2.jsonl").read_text().splitlines()]
    cells = [x for x in first if x["kind"] == "cell"]
    assert first[0]["kind"] == "setting" and first[0]["test"] == 20 and {x["setting"] for x in first} == {first[0]["setting"]}
    assert [x["row"] for x in cells] == [*script.METHODS, "settled", "settled-apl"] and {x["seed"] for x in cells} == {0}
    assert all(len(x["scores"]) == 8 and x["steps"] == 8 for x in cells)
    rates = json.loads((HERE / "rates.json").read_text())
    assert {x["row"]: x["lr"] for x in cells if x["row"] in rates} == rates
    settled = cells[-2]
    kept = sum(p[3] for p in settled["parts"] if p[6])
    assert kept <= 0.5 * sum(p[3] for p in settled["parts"]) and settled["parameters"] == kept + settled["head"] and settled["scored"] == 1 + 7

    run(script, monkeypatch, *common, "--part", "2/2")
    assert "2 cells," in capsys.readouterr().out
    whole = (lines / "cpu-2of2.jsonl").read_text()
    run(script, monkeypatch, *common)  # the whole grid: nothing is left of it
    assert "0 cells to do" in capsys.readouterr().out and not (lines / "cpu-1of1.jsonl").exists()

    (lines / "cpu-2of2.jsonl").write_text("\n".join(whole.splitlines()[:-1])[:-300])  # killed while it wrote
    run(script, monkeypatch, *common, "--report")
    assert "; 1 cells," in capsys.readouterr().out
    run(script, monkeypatch, *common, "--part", "2/2")
    assert "1 cells to do" in capsys.readouterr().out
    again = {x["row"]: x for x in map(parse, (lines / "cpu-2of2.jsonl").read_text().splitlines()) if x and x["kind"] == "cell"}
    before = {x["row"]: x for x in map(json.loads, whole.splitlines()) if x["kind"] == "cell"}
    assert {r: x["scores"] for r, x in again.items()} == {r: x["scores"] for r, x in before.items()}
    assert {r: x["accuracy"] for r, x in again.items()} == {r: x["accuracy"] for r, x in before.items()}

    run(script, monkeypatch, *common, "--test", "10", "--report")  # other test rows: another table
    shown = capsys.readouterr().out
    assert "no cell of setting" in shown and first[0]["setting"] in shown


def test_other_ways_to_settle_start_from_the_same_adapter(
    script: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*TRIAL, "--data", data, "--lines", tmp_path, "--seeds", "0"]
    run(script, monkeypatch, *common, "--rows", "gated", "settled", "calibrated", "by-role")
    rows = {x["row"]: x for x in map(json.loads, (tmp_path / "cpu-1of1.jsonl").read_text().splitlines()) if x["kind"] == "cell"}
    assert set(rows) == {"gated", "settled", "calibrated", "by-role"} and rows["by-role"]["before"] == rows["settled"]["before"]
    assert [p[:5] for p in rows["calibrated"]["parts"]] == [p[:5] for p in rows["settled"]["parts"]]  # the same parts under the same gates
    assert [p[5] for p in rows["calibrated"]["parts"]] != [p[5] for p in rows["settled"]["parts"]]
    run(script, monkeypatch, *common, "--rows", *script.METHODS, "settled")  # rows that are there already stand as they are
    assert "by-role less gated, at" in capsys.readouterr().out


def parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_the_budget_and_the_part(script: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, monkeypatch, *TRIAL, "--data", data, "--lines", tmp_path, "--budget", "0")
    assert "no cell of setting" in capsys.readouterr().out
    for wrong in ("3/2", "0/2", "2", "a/b"):
        with pytest.raises(SystemExit):
            run(script, monkeypatch, *TRIAL, "--data", data, "--lines", tmp_path, "--part", wrong)


def test_settling_in_the_race_is_what_settle_does(script: Any, data: Path, tmp_path: Path) -> None:
    """The row 'settled' trains the plan that vn.settle(rewind=True) leaves from the start that it gives it."""
    model = script.base_of(data, 2, "cpu", 0)
    torch.manual_seed(3)
    vn.attach(model, script.plan_of("gated", 0.002), name="gated")
    rows = script.data_of(data, "first")
    kept = vn.settle(model, [{k: v[:8] for k, v in rows["pool"].items() if k != "labels"}], keep=0.5, rewind=True, seed=0, retune=lambda m: 0)
    got = {n: p.detach().clone() for n, p in vn.Adapter(model, "gated").named_parameters()}
    other = script.base_of(data, 2, "cpu", 0)
    start: dict[str, torch.Tensor] = {}

    def see(m: Any) -> float:
        start.update({n: p.detach().clone() for n, p in vn.Adapter(m, "gated").named_parameters()})
        return 0.0

    candidate = Candidate(kept.plan, lr=1e-9)  # the race looks after its first step
    race(other, {"gated": candidate}, rows["pool"], see, steps=1, batch=2, seed=0, keep="none", best=False)
    assert list(got) == list(start) and all(torch.allclose(p, start[n], atol=1e-7, rtol=0) for n, p in got.items())


def test_hindsight_of_other_seeds(script: Any) -> None:
    """Each seed's pick is compared with the plan that was best on the others: here the second of two plans, which the picks miss once."""
    from report import Table  # pyright: ignore[reportMissingImports]

    def rows(best: str, selected: float) -> dict[str, dict[str, float]]:
        return {m: {"accuracy": 0.9 if m == best else 0.5} for m in script.METHODS} | {"selected": {"accuracy": selected}}

    t = Table({("a", 100, 0): rows("lora", 0.9), ("a", 100, 1): rows("lora", 0.5), ("a", 500, 0): rows("ia3", 0.9)})
    assert t.unseen([100]) == pytest.approx([0.0, -40.0]) and t.unseen([500]) == []
