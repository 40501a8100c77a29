"""Hugging Face PEFT's files, both ways, against the installed PEFT: the same weights give the same logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer as vn
from zoo import ZOO, output

LoRA = peft.LoraConfig
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert-lora": ("bert", lambda: LoRA(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "bert-regex": ("bert", lambda: LoRA(r=3, target_modules=r".*layer\.[02].*(query|dense)", use_rslora=True)),
    "bert-bias": ("bert", lambda: LoRA(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")),
    "bert-its-bias": ("bert", lambda: LoRA(r=2, target_modules=["query", "dense"], bias="lora_only")),
    "llama-all": (
        "llama",
        lambda: LoRA(r=4, lora_alpha=5, target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"1.*.v_proj": 3.5}, task_type="CAUSAL_LM"),
    ),
    "llama-layers": ("llama", lambda: LoRA(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")),
    "llama-embed": ("llama", lambda: LoRA(r=4, target_modules=["v_proj", "embed_tokens"], modules_to_save=["lm_head"])),
    "llama-norms": ("llama", lambda: LoRA(r=4, target_modules=["v_proj"], modules_to_save=["norm", "embed_tokens"])),
    "gpt2-fused": ("gpt2", lambda: LoRA(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")),
    "neox-fused": ("gpt_neox", lambda: LoRA(r=4, target_modules=["query_key_value"])),
    "falcon-fused": ("falcon", lambda: LoRA(r=2, target_modules=["query_key_value"])),
    "t5-lora": ("t5", lambda: LoRA(r=4, target_modules=["q", "v", "wi_0"], task_type="SEQ_2_SEQ_LM")),
    "conv": ("convnext", lambda: LoRA(r=4, target_modules=["patch_embeddings", "pwconv1"], modules_to_save=["classifier"])),
    "dora": ("llama", lambda: LoRA(r=4, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"], rank_pattern={"q_proj": 2})),
    "dora-fused": ("gpt2", lambda: LoRA(r=4, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")),
    "dora-conv": ("convnext", lambda: LoRA(r=4, use_dora=True, target_modules=["patch_embeddings", "pwconv1"], modules_to_save=["classifier"])),
    "experts": ("mixtral", lambda: LoRA(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "experts-one": ("qwen2_moe", lambda: LoRA(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    "experts-turned": ("gpt_oss", lambda: LoRA(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "bert-ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"),
    ),
    "llama-ia3": ("llama", lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "gpt2-ia3": ("gpt2", lambda: peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "t5-ia3": ("t5", lambda: peft.IA3Config(task_type="SEQ_2_SEQ_LM")),
    "llama-ln": ("llama", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "bert-ln": ("bert", lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])),
    "bert-prompt": ("bert", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    "roberta-prompt": ("roberta", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")),
    "llama-prompt": ("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "gpt2-prompt": ("gpt2", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "t5-prompt": ("t5", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
    "bert-prefix": ("bert", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")),
    "llama-prefix": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "llama-prefix-mlp": (
        "llama",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, task_type="CAUSAL_LM"),
    ),
    "gpt2-prefix": ("gpt2", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "opt-prefix": ("opt", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "neox-prefix": ("gpt_neox", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


def quietly(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of much that is in order here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return do(*args, **kwargs)


def shaken(model: nn.Module, config: Any, seed: int = 0, name: str = "default") -> Any:
    """PEFT's own model, every trained parameter of it away from its start."""
    made = quietly(peft.get_peft_model, model, config, adapter_name=name)
    shake((p for p in made.parameters() if p.requires_grad), seed)
    return made.eval()


def shake(parameters: Any, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=g) * 0.2)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return quietly(output, model, inputs)


def close(a: Tensor, b: Tensor, inputs: dict[str, Any]) -> None:
    """Equal to 1e-5 of their size, at real tokens; PEFT returns its virtual tokens' logits before them."""
    if a.shape != b.shape:
        a, b = (t[:, -min(a.shape[1], b.shape[1]) :] for t in (a, b))
    mask = inputs.get("attention_mask")
    if mask is not None and a.dim() == 3 and mask.shape == a.shape[:2]:
        a, b = a * mask[..., None], b * mask[..., None]
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    kind, config = CASES[case]
    inputs = ZOO[kind].inputs(2, 7)
    theirs = shaken(ZOO[kind].build(), config())
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    expected = logits(theirs, inputs)

    model = ZOO[kind].build()
    base = logits(model, inputs)
    vn.load(model, tmp_path / "theirs", name="mine")
    ours = logits(model, inputs)
    close(expected, ours, inputs)
    assert not torch.allclose(ours, base, atol=1e-3)

    vn.save(model, tmp_path / "ours", name="mine", format="peft")
    assert sorted(p.name for p in (tmp_path / "ours" / "mine").iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    back = quietly(peft.PeftModel.from_pretrained, ZOO[kind].build(), str(tmp_path / "ours" / "mine")).eval()
    close(logits(back, inputs), ours, inputs)

    again = ZOO[kind].build()
    vn.load(again, tmp_path / "ours")
    close(logits(again, inputs), ours, inputs)
    vn.detach(model)
    assert torch.equal(logits(model, inputs), base)


MADE_HERE: dict[str, tuple[str, Callable[[], vn.Plan]]] = {
    "bert-head": ("bert", lambda: vn.LoRA(4) + vn.Full(at="head")),
    "roberta-head": ("roberta", lambda: vn.LoRA(4, at="attn.{q,k}") + vn.Full(at="head")),
    "biases": ("bert", lambda: vn.LoRA(4) + vn.BitFit()),
    "biases-head": ("gpt2", lambda: vn.LoRA(4) + vn.BitFit(at="attn,norm") + vn.Full(at="name:lm_head", tied=False)),
    "ranks": ("llama", lambda: vn.LoRA(4, at="attn.q") + vn.LoRA(2, alpha=7, at="attn.v,ffn.down") + vn.LoRA(3, at="attn.v@0")),
    "dora": ("bert", lambda: vn.DoRA(4, at="attn.q") + vn.DoRA(2, rank_stabilized=True, at="ffn.up") + vn.BitFit(at="norm")),
    "dora-slices": ("gpt2", lambda: vn.DoRA(4, at="attn.{q,k,v}")),
    "lora-xs": ("llama", lambda: vn.LoRAXS(3)),
    "moslora": ("bert", lambda: vn.MoSLoRA(3)),
    "tied-lora": ("llama", lambda: vn.TiedLoRA(3)),
    "loretta": ("llama", lambda: vn.LoRETTA(3, t=2, cores=2)),
    "embeddings": ("llama", lambda: vn.LoRA(4, at="embed,attn.o")),
    "slices": ("gpt2", lambda: vn.LoRA(4)),
    "groups": ("falcon", lambda: vn.LoRA(4, at="attn.q") + vn.LoRA(2, at="attn.k")),
    "conv": ("convnext", lambda: vn.LoRA(2, at="name:(.*patch_embeddings|.*pwconv2)")),
    "experts": ("mixtral", lambda: vn.LoRA(2, at="ffn.*")),
    "ia3": ("t5", lambda: vn.IA3()),
    "ia3-slices": ("gpt2", lambda: vn.IA3()),
    "ia3-conv": ("vit", lambda: vn.IA3(at="name:.*projection") + vn.Full(at="head")),
    "saved-norm": ("llama", lambda: vn.LoRA(2) + vn.Full(at="name:model.norm")),
    "norms": ("llama", lambda: vn.Full(at="norm")),
    "norms-head": ("bert", lambda: vn.Full(at="norm") + vn.Full(at="head")),
    "prompt": ("llama", lambda: vn.PromptTuning(4)),
    "prompt-cls": ("bert", lambda: vn.PromptTuning(4, before_cls=True) + vn.Full(at="head")),
    "prompt-t5": ("t5", lambda: vn.PromptTuning(4)),
    "prefix": ("llama", lambda: vn.Prefix(4)),
    "prefix-mlp": ("llama", lambda: vn.Prefix(4, reparameterize=6)),
    "prefix-positions": ("gpt2", lambda: vn.Prefix(4, positions=True)),
    "prefix-head": ("bert", lambda: vn.Prefix(4, positions=True) + vn.Full(at="head")),
}


@pytest.mark.parametrize("case", MADE_HERE)
def test_made_here(case: str, tmp_path: Path) -> None:
    kind, plan = MADE_HERE[case]
    inputs = ZOO[kind].inputs(2, 7)
    model = ZOO[kind].build()
    shake(vn.attach(model, plan()).parameters())
    ours = logits(model, inputs)
    vn.save(model, tmp_path, format="peft")
    assert (tmp_path / "adapter_config.json").exists()  # 'default' lies at the root
    theirs = quietly(peft.PeftModel.from_pretrained, ZOO[kind].build(), str(tmp_path)).eval()
    close(logits(theirs, inputs), ours, inputs)
    again = ZOO[kind].build()
    vn.load(again, tmp_path)
    close(logits(again, inputs), ours, inputs)


def test_the_safest_file(tmp_path: Path) -> None:
    """Plain LoRA as serving engines read it: one rank, short names, nothing else."""
    model = ZOO["llama"].build()
    vn.attach(model, vn.LoRA(4, at="linear"))
    vn.save(model, tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"], config["task_type"]) == (4, 8, "none", None, "CAUSAL_LM")
    assert config["inference_mode"] is True and not config["rank_pattern"] and not config["use_dora"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)


def test_several_adapters(tmp_path: Path) -> None:
    inputs = ZOO["bert"].inputs(2, 7)
    theirs = shaken(ZOO["bert"].build(), LoRA(r=2, target_modules=["query"]))
    quietly(theirs.add_adapter, "b", LoRA(r=3, target_modules=["value"]))
    shake((p for n, p in theirs.named_parameters() if ".b." in n), 1)
    quietly(theirs.save_pretrained, tmp_path)
    model = ZOO["bert"].build()
    vn.load(model, tmp_path)
    vn.load(model, tmp_path / "b", name="b")
    for name in ("default", "b"):
        theirs.set_adapter(name)
        vn.activate(model, name)
        close(logits(theirs, inputs), logits(model, inputs), inputs)
    with vn.route(model, ["default", "b"]):
        assert logits(model, inputs).shape == (2, 3)
    vn.save(model, tmp_path / "out", name="default", format="peft")
    vn.save(model, tmp_path / "out", name="b", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, ZOO["bert"].build(), str(tmp_path / "out"))
    quietly(back.load_adapter, str(tmp_path / "out" / "b"), "b")
    back.eval().set_adapter("b")
    close(logits(back, inputs), logits(model, inputs), inputs)


@pytest.mark.parametrize(
    ("kind", "plan", "says"),
    [
        ("bert", lambda: vn.gated(vn.LoRA(2)), "no gates.*vn.settle"),
        ("bert", lambda: vn.LoRA(2) >> vn.IA3(), "no stacks.*native format"),
        ("bert", lambda: vn.Bottleneck(2), "no 'bottleneck'.*native format"),
        ("gpt2", lambda: vn.DoRA(2, at="attn.q"), "whole of a matrix.*native"),
        ("bert", lambda: vn.LoRA(2, at="attn.q") + vn.DoRA(2, at="attn.v"), "mixes lora and dora"),
        ("bert", lambda: vn.LoRA(2) + vn.Prefix(2), "mixes lora and prefix"),
        ("bert", lambda: vn.PromptTuning(2), "before_cls=True"),
        ("bert", lambda: vn.Prefix(2), "positions=True"),
        ("bert", lambda: vn.Prefix(2, at="attn@0", positions=True), "every self-attention"),
        ("bert", lambda: vn.BitFit(), "no 'bitfit'"),
        ("bert", lambda: vn.IA3() + vn.BitFit(), "no 'bitfit'"),
        ("bert", lambda: vn.Full(at="head"), "only whole tensors"),
        ("bert", lambda: vn.IA3(at="attn.k") + vn.IA3(at="attn.k"), "one vector a module"),
        ("t5", lambda: vn.Prefix(2), "encoder-decoder"),
        ("torch_encoder", lambda: vn.LoRA(2), "cannot express LoRA at encoder.layers.0.self_attn.in_proj_weight"),
    ],
)
def test_what_peft_cannot_say(kind: str, plan: Callable[[], vn.Plan], says: str, tmp_path: Path) -> None:
    model = ZOO[kind].build()
    vn.attach(model, plan())
    with pytest.raises(vn.CapabilityError, match=says):
        vn.save(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def spoil(folder: Path, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None) -> None:
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        tensors(found)
        save_file(found, path)


Q = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "weights are missing"),
    "truncated": (lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]), "not a whole safetensors"),
    "pickle": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "pickle"),
    "not-json": (lambda d: (d / "adapter_config.json").write_text("{"), "not a JSON file"),
    "deep": (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "not a JSON file"),
    "a-list": (lambda d: (d / "adapter_config.json").write_text("[]"), "not an adapter's configuration"),
    "type": (lambda d: spoil(d, {"peft_type": "LORAX"}), "'LORAX' cannot be read here.*Did you mean 'LORA'"),
    "dora": (lambda d: spoil(d, {"use_dora": True}), "use_dora is set, and .* needs a lora_magnitude_vector of 32; the file has none"),
    "replication": (lambda d: spoil(d, {"layer_replication": [[0, 2]]}), "layer_replication="),
    "tokens": (lambda d: spoil(d, {"trainable_token_indices": [1]}), "trainable_token_indices="),
    "new-field": (lambda d: spoil(d, {"use_magic": 3}), "use_magic=3 cannot be read"),
    "bias": (lambda d: spoil(d, {"bias": "some"}), "bias='some'"),
    "pissa": (lambda d: spoil(d, {"init_lora_weights": "pissa"}), "changes the base's weights"),
    "rank": (lambda d: spoil(d, {"r": 3}), "rank 2 in the weights and 3 in the configuration"),
    "rank-type": (lambda d: spoil(d, {"r": "2"}), "r must be a whole number"),
    "alpha": (lambda d: spoil(d, {"lora_alpha": float("nan")}), "lora_alpha must be a finite number"),
    "dropout": (lambda d: spoil(d, {"lora_dropout": 7}), "dropout"),
    "pattern": (lambda d: spoil(d, {"rank_pattern": {"(": 3}}), "no regular expression"),
    "redos": (lambda d: spoil(d, {"rank_pattern": {r"(\w+)+!": 3}}), "repetition within repetition"),
    "table": (lambda d: spoil(d, {"alpha_pattern": [1]}), "alpha_pattern must be a mapping"),
    "half": (lambda d: spoil(d, tensors=lambda t: t.pop(Q + "B.weight")), "lora_A alone"),
    "shape": (lambda d: spoil(d, tensors=lambda t: t.update({Q + "A.weight": torch.ones(2, 31)})), "do not fit"),
    "scalar": (lambda d: spoil(d, tensors=lambda t: t.update({Q + "A.weight": torch.ones(())})), "do not fit"),
    "integers": (lambda d: spoil(d, tensors=lambda t: t.update({Q + "A.weight": torch.ones(2, 32, dtype=torch.int32)})), "not floating point"),
    "stranger": (lambda d: spoil(d, tensors=lambda t: t.update({"base_model.model.odd": torch.ones(1)})), "'odd', which LORA does not have"),
    "other-key": (lambda d: spoil(d, tensors=lambda t: t.update({"odd": torch.ones(1)})), "'odd' that is not of a LORA adapter"),
    "module": (
        lambda d: spoil(d, tensors=lambda t: t.update({k.replace("query", "querry"): t.pop(k) for k in list(t)})),
        "no module 'bert.encoder.layer.0.attention.self.querry' here.*attention.self.query",
    ),
    "empty": (lambda d: spoil(d, tensors=lambda t: t.clear()), "no tensor of LORA"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files(fault: str, tmp_path: Path) -> None:
    model = ZOO["bert"].build()
    vn.attach(model, vn.LoRA(2))
    vn.save(model, tmp_path, format="peft")
    vn.detach(model)
    before = logits(model, ZOO["bert"].inputs(2, 7))
    change, says = BAD[fault]
    change(tmp_path)
    with pytest.raises(vn.StoreError, match=says) as caught:
        vn.load(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "_veneer_state" not in model.__dict__ and torch.equal(logits(model, ZOO["bert"].inputs(2, 7)), before)


JUNK: list[Any] = [True, -1, 2**70, float("nan"), "", "(", [], [1], [[]], {"a": "b"}, {"": 1}, {".*": 2}]


@pytest.mark.parametrize("plan", [lambda: vn.LoRA(2) + vn.BitFit(), lambda: vn.IA3(), lambda: vn.Prefix(2, positions=True)])
def test_junk(plan: Callable[[], vn.Plan], tmp_path: Path) -> None:
    """Whatever stands in a field or in a tensor's place: the adapter loads, or is refused as a file."""
    model = ZOO["bert"].build()
    vn.attach(model, plan())
    vn.save(model, tmp_path, format="peft")
    vn.detach(model)

    def attempt() -> None:
        try:
            vn.load(model, tmp_path)
        except vn.StoreError:
            assert "_veneer_state" not in model.__dict__
        else:
            vn.detach(model)

    config_path, weights_path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    for key in [*config, "use_rslora", "feedforward_modules", "target_parameters"]:
        for junk in JUNK:
            config_path.write_text(json.dumps({**config, key: junk}))
            attempt()
    config_path.write_text(json.dumps(config))
    first = next(iter(tensors))
    for value in (torch.ones(()), torch.ones(0), torch.ones(0, 3), torch.ones(3, 4, 5), tensors[first].t().contiguous()):
        save_file({**tensors, first: value}, weights_path)
        attempt()
    for name in ("base_model.model.", "base_model.model..lora_A.weight", "base_model.model.bias", first + ".x"):
        save_file({**{k: v for k, v in tensors.items() if k != first}, name: tensors[first]}, weights_path)
        with pytest.raises(vn.StoreError):
            vn.load(model, tmp_path)


def test_other_bases(tmp_path: Path) -> None:
    for kind, plan, other in (
        ("bert", vn.LoRA(2), "llama"),
        ("llama", vn.IA3(), "gpt2"),
        ("llama", vn.Prefix(3), "qwen3"),
        ("llama", vn.Prefix(3), "t5"),
        ("llama", vn.PromptTuning(3), "swin"),
        ("llama", vn.Full(at="norm"), "bert"),
    ):
        model = ZOO[kind].build()
        vn.attach(model, plan)
        vn.save(model, tmp_path, format="peft")
        with pytest.raises(vn.StoreError):
            vn.load(ZOO[other].build(), tmp_path)
    windowed = ZOO["gemma3"].build()
    vn.attach(windowed, vn.Prefix(3))
    with pytest.raises(vn.VeneerError, match="sliding window"):
        vn.attach(windowed, vn.Prefix(3, positions=True), name="b")


def test_which_folder(tmp_path: Path) -> None:
    model = ZOO["bert"].build()
    for name in ("a", "b"):
        vn.attach(model, vn.LoRA(2), name=name)
        vn.save(model, tmp_path, name=name, format="peft")
    fresh = ZOO["bert"].build()
    with pytest.raises(vn.StoreError, match="2 adapters here.*'a', 'b'"):
        vn.load(fresh, tmp_path)
    assert vn.load(fresh, tmp_path, name="b").name == "b"
    with pytest.raises(vn.StoreError, match="no adapter here"):
        vn.load(fresh, tmp_path / "c")
    with pytest.raises(vn.AdapterError, match="attached already"):
        vn.load(fresh, tmp_path, name="b")
