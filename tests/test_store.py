"""What is loaded is what was saved, to the bit, in another process, dtype or state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer as vn
from helpers import MIXED, build, config_of, fresh, look, refuses, shake, weights_of
from veneer.files import digest


# -- what is loaded is what was saved ---------------------------------------------------------------------------------
def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    model, inputs = fresh()
    for i, plan in enumerate((MIXED, "unipelt-apl", {"method": "prompt", "length": 3})):
        shake(vn.attach(model, plan, name=f"n{i}"))
        vn.save(model, tmp_path / f"n{i}")
        torch.save(look(model, inputs), tmp_path / f"n{i}.pt")
    program = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2].split(":")
import veneer as vn
from helpers import fresh, look
for i in range(3):
    model, inputs = fresh()
    vn.load(model, f"{sys.argv[1]}/n{i}")
    assert vn.active(model) == (f"n{i}",)
    assert torch.equal(look(model, inputs), torch.load(f"{sys.argv[1]}/n{i}.pt")), i
print("same")
"""
    where = ":".join((str(Path(vn.__file__).parents[1]), str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), where], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = fresh()
    shake(vn.attach(model, vn.LoRA(2) + vn.Bottleneck(3), name="a", dtype=dtype))
    vn.save(model, tmp_path)
    other = build()
    adapter = vn.load(other, tmp_path)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    assert torch.equal(look(other, inputs), look(model, inputs))


def test_loading_draws_no_random_numbers_and_keeps_the_others(saved: Path) -> None:
    model, inputs = fresh()
    shake(vn.attach(model, vn.LoRA(2), name="first"))
    before, dice = look(model, inputs), torch.random.get_rng_state()
    adapter = vn.load(model, saved, name="second", activate=False)
    assert torch.equal(dice, torch.random.get_rng_state())
    assert vn.active(model) == ("first",) and torch.equal(look(model, inputs), before)
    assert all(p.requires_grad and p.is_leaf for p in adapter.parameters())
    vn.detach(model, "second")
    assert torch.equal(look(model, inputs), before)


def test_a_prompt_from_text_loads_without_its_tokenizer(tmp_path: Path) -> None:
    model, inputs = fresh("llama")
    words = lambda text, add_special_tokens: {"input_ids": [7, 8, 9, 10]}  # noqa: E731
    shake(vn.attach(model, vn.PromptTuning(None, init="text", text="say what it is"), name="p", tokenizer=words))
    vn.save(model, tmp_path)
    other = build("llama")
    vn.load(other, tmp_path)
    assert torch.equal(look(other, inputs), look(model, inputs))


def test_a_prefix_is_saved_without_its_mlp(tmp_path: Path) -> None:
    model, inputs = fresh()
    shake(vn.attach(model, vn.gated(vn.Prefix(3, reparameterize=8)), name="p"), scale=0.05)
    vn.save(model, tmp_path)
    assert {k.rsplit(".", 1)[-1] for k in load_file(weights_of(tmp_path))} == {"keys", "values", "weight", "bias"}
    other = build()
    vn.load(other, tmp_path)
    torch.testing.assert_close(look(other, inputs), look(model, inputs), atol=1e-6, rtol=1e-5)


def test_saved_files_are_two_and_an_old_one_goes(tmp_path: Path) -> None:
    model = build()
    adapter = vn.attach(model, vn.LoRA(2), name="a")
    mine = tmp_path / "adapter-notes.safetensors"
    mine.write_bytes(b"the user's own")
    for seed in range(3):
        shake(adapter, seed)
        adapter.save(tmp_path)
        names = {p.name for p in tmp_path.iterdir()}
        assert names == {"adapter.json", config_of(tmp_path)["weights"], mine.name}
    assert config_of(tmp_path)["sha256"] == digest(weights_of(tmp_path).read_bytes())


def test_save_while_merged_is_the_same_file(tmp_path: Path) -> None:
    model, inputs = fresh()
    shake(vn.attach(model, vn.LoRA(2) + vn.BitFit(), name="a"))
    after = look(model, inputs)
    vn.save(model, tmp_path / "before")
    vn.merge(model)
    vn.save(model, tmp_path / "after", name="a")
    assert config_of(tmp_path / "before") == config_of(tmp_path / "after")
    other = build()
    vn.load(other, tmp_path / "after")
    assert torch.equal(look(other, inputs), after)


def test_load_while_merged_is_refused(saved: Path) -> None:
    model = build()
    shake(vn.attach(model, vn.LoRA(2), name="a"))
    vn.merge(model)
    with refuses(vn.AdapterError, "merged", "unmerge", model=model):
        vn.load(model, saved, name="b")


def test_names(saved: Path, base: Any) -> None:
    with refuses(vn.AdapterError, "'a/b'", model=base):
        vn.load(base, saved, name="a/b")
    model = build()
    vn.load(model, saved)
    with refuses(vn.AdapterError, "'a' is attached already", "another name", model=model):
        vn.load(model, saved)
    with refuses(vn.AdapterError, "no adapter called 'aa'", "'a'"):
        vn.save(model, saved, name="aa")
    with refuses(vn.StoreError, "no format 'pft'", "'peft'"):
        vn.save(model, saved, format="pft")
    vn.load(model, saved, name="b")
    vn.activate(model, ["a", "b"])
    with refuses(vn.StoreError, "2 adapters are active", "name='mine'"):
        vn.save(model, saved)


def test_half_precision_of_the_same_base_is_the_same_base(saved: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        vn.load(build().to(dtype), saved)


def test_a_meta_base_takes_an_adapter(saved: Path) -> None:
    model = build().to("meta")
    adapter = vn.load(model, saved)
    assert all(p.is_meta for p in adapter.parameters())
