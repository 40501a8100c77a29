"""Adapters from one file format to the other, and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer as vn
from veneer.serve.convert import convert
from veneer.serve.measure import output, probe
from veneer.serve.opened import open_folder


def test_there_and_back(runs, bases, tmp_path):
    from peft import PeftModel

    there = convert(runs["lora"], tmp_path / "peft")
    assert there.format == "peft" and (there.path / "adapter_config.json").exists() and there.difference.largest < 1e-5 < there.difference.effect
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


def test_refusals_leave_nothing(runs, tmp_path):
    with pytest.raises(vn.CapabilityError, match="PEFT"):
        convert(runs["gated"], tmp_path / "x")
    with pytest.raises(vn.ConfigError, match="no format 'pefd'.*Did you mean 'peft'"):
        convert(runs["lora"], tmp_path / "x", format="pefd")
    with pytest.raises(vn.ConfigError, match="not a run"):
        convert(tmp_path, tmp_path / "x")
    assert not list(tmp_path.iterdir())
