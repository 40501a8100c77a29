"""Opening what was trained, and folders that hold nothing of the kind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import veneer as vn
from veneer.example import example as probe
from veneer.serve.measure import output
from veneer.serve.opened import open_folder


def test_a_run_opens_from_its_folder_alone(runs):
    opened = open_folder(runs["lora"])
    assert opened.names == ["adapter"] and type(opened.model).__name__ == "LlamaForCausalLM" and opened.tokenizer.chat_template
    assert vn.active(opened.model) == ("adapter",) and not opened.model.training


def test_a_bare_adapter_opens_with_its_base(runs, tmp_path):
    whole = open_folder(runs["lora"])
    vn.save(whole.model, tmp_path / "peft", name="adapter", format="peft")
    inputs = probe(whole.model)
    wanted = output(whole.model, inputs)
    for folder in (runs["lora"] / "adapter", tmp_path / "peft"):
        opened = open_folder(folder)
        assert type(opened.model) is not type(None) and torch.allclose(output(opened.model, inputs), wanted, atol=1e-5)


def test_several_adapters_of_one_base(runs):
    opened = open_folder(runs["lora"], more=[str(runs["ia3"]), f"{runs['gated']}=g"])
    assert opened.names == ["adapter", "ia3", "g"]
    inputs = probe(opened.model)
    found = {}
    for name in opened.names:
        opened.use([name])
        found[name] = output(opened.model, inputs)
    opened.use([])
    found["base"] = output(opened.model, inputs)
    alone = {"adapter": "lora", "ia3": "ia3", "g": "gated"}
    for name, run in alone.items():
        assert torch.allclose(found[name], output(open_folder(runs[run]).model, inputs), atol=1e-5)
        assert not torch.allclose(found[name], found["base"], atol=1e-3)
    with pytest.raises(vn.AdapterError, match="Did you mean 'ia3'"):
        opened.use(["ia33"])
    with pytest.raises(vn.StoreError, match="another base"):
        opened.add(runs["bert"])


@pytest.mark.parametrize("what", ["nothing", "empty", "unfinished", "no base", "damaged", "old"])
def test_what_is_no_run_is_refused_in_words(runs, tmp_path, what):
    folder = tmp_path / "r"
    if what not in ("nothing", "empty"):
        shutil.copytree(runs["lora"], folder)
    path = folder / "run.json"
    said = {
        "nothing": "this folder is not a run: it has no run.json",
        "empty": "this folder is not a run: it has no run.json",
        "unfinished": "has not finished.*Run the same",
        "no base": "the base of this run is not there.*--model PATH",
        "damaged": "run.json is damaged",
        "old": "there is no key 'rank'.*written by veneer 0.0.1, and this is .*adapter alone",
    }[what]
    if what == "empty":
        folder.mkdir()
    elif what == "unfinished":
        shutil.rmtree(folder / "adapter")
    elif what == "damaged":
        path.write_text(path.read_text()[:100])
    elif what in ("no base", "old"):
        data = json.loads(path.read_text())
        if what == "old":
            data["config"]["rank"], data["versions"]["veneer"] = 4, "0.0.1"
        else:
            data["config"]["model"] = str(tmp_path / "gone")
        path.write_text(json.dumps(data))
    with pytest.raises(vn.VeneerError, match=said):
        open_folder(folder)
    if what == "no base":
        assert open_folder(folder, model=str(json.loads((runs["lora"] / "run.json").read_text())["config"]["model"])).names == ["adapter"]


def test_a_bare_adapter_without_a_base_asks_for_one(runs, tmp_path):
    shutil.copytree(runs["lora"] / "adapter", tmp_path / "a")
    data = json.loads((tmp_path / "a" / "adapter.json").read_text())
    data["base"]["name_or_path"] = ""
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(data))
    with pytest.raises(vn.ConfigError, match="does not say which base.*--model"):
        open_folder(tmp_path / "a")


def test_merging_opens_the_base_unquantised(runs, tmp_path, monkeypatch):
    """A run that says its base was quantised; loading it so is asked for only where it is used as it was trained."""
    import veneer.serve.opened as ours

    shutil.copytree(runs["lora"], tmp_path / "r")
    data = json.loads((tmp_path / "r" / "run.json").read_text())
    data["config"]["quantization"] = "torchao-int8"
    (tmp_path / "r" / "run.json").write_text(json.dumps(data))
    asked = []
    load = ours.load_model
    monkeypatch.setattr(
        ours, "load_model", lambda config, *a: (asked.append(config.quantization), load(config.model_copy(update={"quantization": None}), *a))[1]
    )
    open_folder(tmp_path / "r")
    opened = open_folder(tmp_path / "r", plain=True)
    assert asked == ["torchao-int8", None] and all(p.dtype == torch.float32 for p in opened.model.parameters())
