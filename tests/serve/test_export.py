"""Runs for other programs, each read by that program's own reader, here once more and apart from the product's check."""

from __future__ import annotations

import json

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import veneer as vn
from veneer.cli import app
from veneer.example import example as probe
from veneer.serve.export import TARGETS, export
from veneer.serve.export.gguf import halved, paired
from veneer.serve.export.vllm import flaws
from veneer.serve.measure import output
from veneer.serve.opened import open_folder
from zoo import ZOO


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_read_again(runs, tmp_path, target):
    done = CliRunner().invoke(app, ["export", str(runs["lora"]), "--to", target, "--out", str(tmp_path / "x")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "read again by" in done.output and "output differs by at most" in done.output
    largest = float(done.output.split("at most ")[1].split()[0])
    effect = float(done.output.strip().rpartition("up to ")[2])
    assert largest < 1e-4 < 1e-2 < effect


def test_gguf_follows_llama_cpps_rules(runs, tmp_path):
    opened = open_folder(runs["lora"])
    parts = {p.site.path: p for p in opened.model.__dict__["_veneer_state"].adapters["adapter"].parts}
    path = export(opened, tmp_path / "g", "gguf").path
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == ("adapter", "lora", "llama")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 * len(parts) == 28 and all(n.endswith((".lora_a", ".lora_b")) for n in tensors)
    scale = fields["adapter.lora.alpha"] / 4
    for ours, theirs, heads in (("self_attn.k_proj", "attn_k", 2), ("mlp.down_proj", "ffn_down", None), ("self_attn.q_proj", "attn_q", 4)):
        a, b = tensors[f"blk.1.{theirs}.weight.lora_a"], tensors[f"blk.1.{theirs}.weight.lora_b"]
        part = parts[f"model.layers.1.{ours}"]
        assert list(a.shape) == [part.site.inp, 4] and list(b.shape) == [4, part.site.out]  # ggml's ne: innermost first
        want = part.scale * (part.B @ part.A).detach().numpy()
        if heads is not None:  # head by head: row i of the first half, row i of the second, and so on
            d = want.shape[0] // heads
            rows = [h * d + half * d // 2 + i for h in range(heads) for i in range(d // 2) for half in range(2)]
            want = want[rows]
        assert np.allclose(scale * b.data @ a.data, want, atol=1e-6)


def test_vllm_gets_what_it_reads(runs, tmp_path):
    path = export(open_folder(runs["lora"]), tmp_path / "v", "vllm").path
    config, tensors = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["bias"] == "none" and not config["modules_to_save"]
    assert len(tensors) == 28 and {k.rsplit(".", 2)[1] for k in tensors} == {"lora_A", "lora_B"}
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    assert flaws(config, shapes) == []
    changes = {
        "peft_type": "IA3", "r": None, "use_dora": True, "modules_to_save": ["score"], "bias": "all", "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 2},
    }  # fmt: skip
    for key, value in changes.items():
        assert len(flaws({**config, key: value}, shapes)) == 1, key
    assert "no place for" in flaws(config, {**shapes, "base_model.model.score.weight": (2, 4)})[0]
    assert "over its 512" in flaws(config, {"base_model.model.a.lora_A.weight": (600, 8), "base_model.model.a.lora_B.weight": (8, 600)})[0]
    with pytest.raises(vn.CapabilityError, match="vLLM cannot serve this adapter|PEFT"):
        export(open_folder(runs["gated"]), tmp_path / "w", "vllm")
    assert not (tmp_path / "w").exists()


def test_pairing_has_an_inverse():
    w = torch.arange(48.0).reshape(24, 2)
    assert torch.equal(halved(paired(w, 3), 3), w) and not torch.equal(paired(w, 3), w)
    assert paired(w, 3)[:4, 0].tolist() == [0.0, 8.0, 2.0, 10.0]


def test_onnx_takes_other_shapes_and_holds_unmergeable_methods(runs, tmp_path):
    opened = open_folder(runs["gated"])
    ids = torch.randint(200, 2000, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    wanted = output(opened.model, inputs).numpy()
    done = export(opened, tmp_path / "x", "onnx")
    assert done.difference.largest < 1e-4
    session = onnxruntime.InferenceSession(str(done.path))
    found = session.run(None, {k: v.numpy() for k, v in inputs.items()})[0]
    real = mask.bool().numpy()
    assert np.allclose(found[real], wanted[real], atol=1e-4)


def test_the_single_file_says_all_of_itself(runs, tmp_path):
    done = export(open_folder(runs["gated"]), tmp_path / "s", "safetensors")
    with safe_open(done.path, framework="pt") as f:
        said = json.loads(f.metadata()["veneer"])
    assert vn.Plan.from_dict(said["plan"]).to_dict() == said["plan"] and said["base"]["class"] == "LlamaForCausalLM"
    assert done.difference.largest == 0


@pytest.mark.parametrize(
    ("run", "target", "says"),
    [
        ("gated", "peft", "PEFT"),
        ("gated", "gguf", "hold LoRA on linear maps.*Settle"),
        ("ia3", "gguf", "hold LoRA on linear maps, and this one has.*veneer merge"),
        ("bert", "gguf", "how llama.cpp stores 'bert' is not known"),
        ("lora", "ggfu", "there is no target 'ggfu'.*Did you mean 'gguf'"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(runs, tmp_path, run, target, says):
    with pytest.raises(vn.VeneerError, match=says):
        export(open_folder(runs[run]), tmp_path / "x", target)
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_absent_is_named(runs, tmp_path, monkeypatch):
    import veneer.serve.export as ours

    find = ours.importlib.util.find_spec
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(vn.ConfigError, match=r"'onnxscript' is not installed.*veneer\[export\]"):
        export(open_folder(runs["lora"]), tmp_path / "x", "onnx")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "mbart", "vit", "clip", "whisper", "wav2vec2"])
def test_inputs_are_made_by_what_the_model_says_it_reads(kind):
    model = ZOO[kind].build()
    a, b, c = (output(model, probe(model, seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)
