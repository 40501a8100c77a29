"""Adapters from one file format to the other, and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer as vn
from veneer.example import example as probe
from veneer.serve.convert import convert
from veneer.serve.measure import output
from veneer.serve.opened import open_folder


def test_there_and_back(runs, bases, tmp_path):
    from peft import PeftModel

    there = convert(runs["lora"], tmp_path / "peft")
    assert there.format == "peft" and there.path == tmp_path / "peft" and (there.path / "adapter_config.json").exists()
    assert there.difference.largest < 1e-5 < there.difference.effect
    back = convert(there.path, tmp_path / "native")
    assert back.format == "veneer" and (tmp_path / "native" / "adapter.json").exists() and back.difference.largest < 1e-5

    def tensors(folder):
        return load_file(next(folder.glob("adapter-*.safetensors")))

    a, b = tensors(runs["lora"] / "adapter"), tensors(tmp_path / "native")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    opened = open_folder(runs["lora"])
    inputs = probe(opened.model)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), there.path)
    assert torch.allclose(output(theirs, inputs), output(opened.model, inputs), atol=1e-5)


def test_an_adapter_of_any_name_lies_in_the_folder_itself(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    vn.attach(model, vn.LoRA(2, init="gaussian"), name="mine")
    vn.save(model, tmp_path / "native", name="mine")
    there = convert(tmp_path / "native", tmp_path / "peft", model=str(bases / "llama"))
    assert there.path == tmp_path / "peft" and {f.name for f in there.path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_refusals_leave_nothing(runs, tmp_path):
    with pytest.raises(vn.CapabilityError, match="PEFT"):
        convert(runs["gated"], tmp_path / "x")
    with pytest.raises(vn.ConfigError, match="no format 'pefd'.*Did you mean 'peft'"):
        convert(runs["lora"], tmp_path / "x", format="pefd")
    with pytest.raises(vn.ConfigError, match="not a run"):
        convert(tmp_path, tmp_path / "x")
    assert not list(tmp_path.iterdir())
