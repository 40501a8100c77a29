"""Files: what is loaded is what was saved, and nothing damaged, foreign or hostile gets in."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer as vn
from helpers import MIXED, build, fresh, look, refuses, shake, unchanged
from veneer.files import digest, write_whole
from zoo import ZOO

DAMAGED = (vn.StoreError, vn.PlanError, vn.SiteError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a"
    model = build()
    shake(vn.attach(model, MIXED, name="a"))
    vn.save(model, path)
    return path


@pytest.fixture(scope="module")
def base() -> Any:
    """One model for all refusals: each must leave it as it was."""
    return build()


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter.json").read_text())


def weights_of(path: Path) -> Path:
    return path / config_of(path)["weights"]


def rewrite(source: Path, to: Path, change: Any = None, tensors: Any = None) -> Path:
    """A copy of an adapter, consistent in its digest and list, with its configuration or tensors changed."""
    to.mkdir(parents=True, exist_ok=True)
    config = config_of(source)
    if tensors is not None:
        config["tensors"] = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()}
        save_file(tensors, to / config["weights"])
    else:
        (to / config["weights"]).write_bytes(weights_of(source).read_bytes())
    config["sha256"] = digest((to / config["weights"]).read_bytes())
    if change is not None:
        change(config)
    (to / "adapter.json").write_text(json.dumps(config))
    return to


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


# -- another base -----------------------------------------------------------------------------------------------------
def test_another_base(saved: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    wide = BertForSequenceClassification(BertConfig(**{**build().config.to_dict(), "intermediate_size": 56}))  # type: ignore[union-attr]
    with refuses(vn.StoreError, "another base", r"56", r"48", "BertForSequenceClassification", model=wide):
        vn.load(wide, saved)
    other = build()
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.query.weight.mul_(1.5)
    with refuses(vn.StoreError, "another base: the numbers of bert.encoder.layer.1.attention.self.query.weight differ", "check_base=False", model=other):
        vn.load(other, saved)
    vn.load(other, saved, check_base=False)
    with refuses((vn.StoreError, vn.SiteError), "bias|another base", model=(llama := build("llama"))):  # type: ignore[arg-type]
        vn.load(llama, saved)


def test_a_new_head_is_no_other_base(saved: Path) -> None:
    other = build()
    with torch.no_grad():
        other.classifier.weight.normal_()
    inputs = ZOO["bert"].inputs(3, 7)
    vn.load(other, saved)
    first = build()
    vn.load(first, saved)
    assert torch.equal(look(first, inputs), look(other, inputs))


# -- damage -----------------------------------------------------------------------------------------------------------
def test_nothing_there(tmp_path: Path, base: Any, saved: Path) -> None:
    with refuses(vn.StoreError, "no adapter here", "vn.save", model=base):
        vn.load(base, tmp_path)
    with refuses(vn.StoreError, "no adapter here", model=base):
        vn.load(base, tmp_path / "no" / "where")
    with refuses(vn.StoreError, "no adapter here", model=base):
        vn.load(base, saved / "adapter.json")
    gone = rewrite(saved, tmp_path / "gone")
    weights_of(gone).unlink()
    with refuses(vn.StoreError, "weights are missing", "adapter-", model=base):
        vn.load(base, gone)
    (tmp_path / "f" / "adapter.json").mkdir(parents=True)
    with refuses(vn.StoreError, "not a file", model=base):
        vn.load(base, tmp_path / "f")
    (tmp_path / "p").mkdir()
    os.mkfifo(tmp_path / "p" / "adapter.json")  # reading it would wait for ever
    with refuses(vn.StoreError, "not a file", model=base):
        vn.load(base, tmp_path / "p")


def test_truncated_at_any_length(saved: Path, tmp_path: Path, base: Any) -> None:
    whole = weights_of(saved).read_bytes()
    target = rewrite(saved, tmp_path)
    dice = random.Random(3)
    for n in [0, 1, 7, 8, 9, 64, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(20))]:
        weights_of(target).write_bytes(whole[:n])
        with pytest.raises(vn.StoreError, match="SHA-256|safetensors"):
            vn.load(base, target)
    text = (saved / "adapter.json").read_bytes()
    weights_of(target).write_bytes(whole)
    for n in [0, 1, 2, len(text) - 3, *(dice.randrange(len(text)) for _ in range(12))]:
        (target / "adapter.json").write_bytes(text[:n])
        with pytest.raises(vn.StoreError, match="not a JSON file"):
            vn.load(base, target)
    with unchanged(base):
        (target / "adapter.json").write_bytes(text)
        vn.load(base, target)
        vn.detach(base)


def test_flipped_bits(saved: Path, tmp_path: Path, base: Any) -> None:
    whole = bytearray(weights_of(saved).read_bytes())
    header = int.from_bytes(whole[:8], "little")
    target = rewrite(saved, tmp_path)
    dice = random.Random(4)
    places = [*range(9), *(dice.randrange(8, 8 + header) for _ in range(15)), *(dice.randrange(8 + header, len(whole)) for _ in range(15))]
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << dice.randrange(8)
        weights_of(target).write_bytes(data)
        with pytest.raises(vn.StoreError, match="SHA-256"):
            vn.load(base, target)
        # a digest made to fit: the parser and the checks of names and shapes must still give a clear answer
        forged = rewrite(target, tmp_path / "forged")
        try:
            vn.load(base, forged)
        except DAMAGED as e:
            assert str(forged) in str(e)
        else:
            vn.detach(base)  # a number that is another number: no one can tell
    with unchanged(base):
        pass


def test_other_tensors_than_the_plan_has(saved: Path, tmp_path: Path, base: Any) -> None:
    good = load_file(weights_of(saved))
    key = next(k for k in good if k.endswith("lora.0.A"))

    def refused(change: Any, *texts: str) -> None:
        tensors = dict(good)
        change(tensors)
        with refuses(vn.StoreError, *texts, str(tmp_path), model=base):
            vn.load(base, rewrite(saved, tmp_path, tensors=tensors))

    refused(lambda t: t.pop(key), "is missing", r"lora\.0\.A")
    refused(lambda t: t.clear(), "is missing")
    refused(lambda t: t.update({key.replace("0.A", "0.C"): t[key].clone()}), "plan does not have", "Did you mean")
    refused(lambda t: t.update({key: t[key][:1].clone()}), r"\[1, 32\], and \[2, 32\] is needed")
    refused(lambda t: t.update({key: t[key].to(torch.int64)}), "type int64", "float of 16, 32 or 64")
    refused(lambda t: t.update({key: t[key].to(torch.float8_e4m3fn)}), "float8")
    forged = rewrite(saved, tmp_path, lambda c: c["tensors"].update({key: ["float32", [1, 1]]}))
    with refuses(vn.StoreError, "not as listed", model=base):
        vn.load(base, forged)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("format", "other", "not an adapter of this library"),
        ("version", 2, "version 2 is not 1"),
        ("version", True, "version True"),
        ("weights", "../adapter.safetensors", "not the name"),
        ("weights", "/etc/passwd", "not the name"),
        ("weights", "..", "not the name"),
        ("weights", "a\x00.safetensors", "not the name"),
        ("weights", ["x"], "not the name"),
        ("sha256", "0" * 64, "begins with [0-9a-f]{12}, not 000000000000"),
        ("sha256", None, "not a SHA-256"),
        ("tensors", [], "list of tensors"),
        ("name", "../../x", "an adapter's name"),
        ("name", None, "an adapter's name"),
        ("name", ["a"], "an adapter's name"),
        ("base", None, "description of the base"),
        ("base", {"shapes": {"a": "b"}, "samples": {}}, "description of the base"),
        ("base", {"shapes": {}, "samples": {"bert": [{}]}}, "description of the base"),
        ("base", {"shapes": {}, "samples": {"bert": [10**400]}}, "description of the base"),
        ("base", {"shapes": {"nothing": [1]}, "samples": {}}, "no nothing here"),
        ("plan", None, "a plan is"),
        ("plan", {"method": "lora", "r": -1}, "at least 1, and of some use, not -1"),
        ("plan", {"method": "lora", "r": 33}, "over the rank 32"),
        ("plan", {"method": "lora", "r": "8"}, "not '8'"),
        ("plan", {"method": "lora", "r": 10**30}, "whole number"),
        ("plan", {"method": "lora", "alpha": float("nan")}, "finite"),
        ("plan", {"method": "lora", "alpha": 10**400}, "finite"),
        ("plan", {"method": "lora", "rank": 8}, "no option 'rank'.*Known here|no option 'rank'.*Did you mean"),
        ("plan", {"method": "lorra"}, "no method 'lorra'.*'lora'"),
        ("plan", {"method": "lora", "at": "{a,b}" * 40}, "alternatives"),
        ("plan", {"method": "lora", "at": "{" * 500 + "a" + "}" * 500}, "braces"),
        ("plan", {"method": "prefix", "length": 10**11}, "is needed|does not have|could not be built"),
        ("plan", {"method": "prefix", "length": 10**40}, "whole number"),
        ("plan", {"method": "prefix", "length": 2, "reparameterize": 10**11}, "is missing|could not be built|is needed|does not have"),
        ("plan", {"method": "prompt", "length": 10**11}, "is missing|could not be built"),
        ("plan", {"method": "prompt", "length": 10**11, "init": "vocab"}, "is missing|could not be built"),
        ("plan", {"method": "bottleneck", "size": 10**9}, "over 16 times the width"),
        ("plan", {"gated": {"method": "lora"}, "bias": 10**400}, "finite"),
    ],
)  # fmt: skip
def test_absurd_values(key: str, value: Any, text: str, saved: Path, tmp_path: Path, base: Any) -> None:
    forged = rewrite(saved, tmp_path, lambda c: c.update({key: value}))
    with refuses((*DAMAGED, vn.AdapterError), text, model=base):  # type: ignore[arg-type]
        vn.load(base, forged)


def test_unknown_missing_and_double_keys(saved: Path, tmp_path: Path, base: Any) -> None:
    for key in config_of(saved):
        forged = rewrite(saved, tmp_path, lambda c, key=key: c.pop(key))
        with refuses(DAMAGED, "missing|not an adapter|version", model=base):  # type: ignore[arg-type]
            vn.load(base, forged)
    forged = rewrite(saved, tmp_path, lambda c: c.update(plam={}))
    with refuses(vn.StoreError, "unknown key 'plam'", "'plan'", "adapter.json", model=base):
        vn.load(base, forged)
    text = json.dumps(config_of(saved))
    (forged / "adapter.json").write_text('{"format": "veneer", ' + text[1:])
    with refuses(vn.StoreError, "'format' stands twice", model=base):
        vn.load(base, forged)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", '"x"', "\udcff", "1" * 5000, '{"format": "veneer"}'])
def test_nested_garbage(text: str, tmp_path: Path, base: Any) -> None:
    (tmp_path / "adapter.json").write_bytes(text.encode(errors="surrogateescape"))
    with refuses(vn.StoreError, "adapter.json", model=base):
        vn.load(base, tmp_path)


def test_a_plan_nested_without_end(saved: Path, tmp_path: Path, base: Any) -> None:
    plan: Any = {"method": "lora"}
    for _ in range(300):
        plan = {"sum": [plan, {"method": "lora"}]}
    with refuses(vn.PlanError, "nested", model=base):
        vn.load(base, rewrite(saved, tmp_path, lambda c: c.update(plan=plan)))


def test_links(saved: Path, tmp_path: Path, base: Any) -> None:
    target = rewrite(saved, tmp_path / "a")
    weights = weights_of(target)
    kept = weights.rename(tmp_path / "blob")
    weights.symlink_to(kept)  # as a model hub's cache has it
    with unchanged(base):
        vn.load(base, target)
        vn.detach(base)
    for to in ("/dev/zero", "/etc/hostname", str(tmp_path), str(weights)):  # endless, foreign, a folder, itself
        weights.unlink()
        weights.symlink_to(to)
        with refuses(vn.StoreError, "not a file|SHA-256|cannot be read", model=base):
            vn.load(base, target)
    huge = tmp_path / "huge"
    huge.mkdir()
    with (huge / "adapter.json").open("wb") as f:
        f.truncate(1 << 40)  # a terabyte of nothing
    with refuses(vn.StoreError, "MiB of JSON", model=base):
        vn.load(base, huge)


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
            time.sleep(dice.random() * 0.12)
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
