"""Nothing damaged, absurd or hostile gets in, and the model is then as it was."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer as vn
from helpers import config_of, refuses, rewrite, unchanged, weights_of

DAMAGED = (vn.StoreError, vn.PlanError, vn.SiteError)


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
