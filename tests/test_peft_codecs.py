"""PEFT's further types, both ways against the installed PEFT: the same files give the same logits."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import veneer as vn
from helpers import refuses
from peft_further import CALLED, FURTHER, UNSAID
from test_peft_format import close, logits, quietly, shake, shaken, spoil
from zoo import ZOO

T = ["q_proj", "v_proj"]
AT = "attn.{q,v}"

# a config of theirs, a plan of ours that PEFT can express (None: what the file was read into does)
CASES: dict[str, tuple[Callable[[], Any], Callable[[], vn.Plan]]] = {
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=9, target_modules=T, task_type="CAUSAL_LM"),
        lambda: vn.AdaLoRA(4, target=2, alpha=6, at=AT),
    ),
    "vera": (lambda: peft.VeraConfig(r=6, target_modules=[*T, "down_proj"]), lambda: vn.VeRA(6, at="attn.v,ffn.up")),
    "loha": (
        lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=T, rank_pattern={"0.self_attn.q_proj": 2}),
        lambda: vn.LoHa(3, at="attn.q@0") + vn.LoHa(2, alpha=7, at="attn.q@1,attn.v"),
    ),
    "lokr": (
        lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=T, alpha_pattern={"v_proj": 7}),
        lambda: vn.LoKr(8, factor=4, at="attn.q") + vn.LoKr(2, factor=4, at="attn.v"),
    ),
    "lokr-both": (
        lambda: peft.LoKrConfig(r=1, alpha=1, decompose_factor=8, decompose_both=True, target_modules=T),
        lambda: vn.LoKr(1, factor=8, decompose_both=True),
    ),
    "oft": (lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=T), lambda: vn.OFT(8)),
    "oft-series": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=T), lambda: vn.OFT(4, series=6)),
    "oft-number": (lambda: peft.OFTConfig(r=4, oft_block_size=0, block_share=True, target_modules=T), lambda: vn.OFT(8, shared=True)),
    "oft-short": (lambda: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=T), lambda: vn.OFT(4, series=4)),
    "coft": (
        lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=T),
        lambda: vn.OFT(4, constrain=0.2),
    ),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=T), lambda: vn.BOFT(8)),
    "boft-plain": (lambda: peft.BOFTConfig(boft_block_num=4, boft_block_size=0, target_modules=T), lambda: vn.BOFT(4, scale=False)),
    "hra": (lambda: peft.HRAConfig(r=4, target_modules=T), lambda: vn.HRA(2, at="attn.o")),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=T), lambda: vn.RandomMask(r=3, at=AT)),
    "shira-magnitude": (lambda: peft.ShiraConfig(r=1, target_modules=T), lambda: vn.Magnitude(k=128, per="matrix", at="attn.q")),
    "tokens": (lambda: peft.TrainableTokensConfig(token_indices=[9, 1, 7], target_modules=["embed_tokens"]), lambda: vn.TrainableTokens((5, 1, 40))),
    "fourierft": (
        lambda: peft.FourierFTConfig(n_frequency=40, scaling=90, target_modules=T, n_frequency_pattern={"v_proj": 20}),
        lambda: vn.FourierFT(40, at="attn.q") + vn.FourierFT(30, at="attn.v"),
    ),
    "vblora": (
        lambda: peft.VBLoRAConfig(r=2, target_modules=T, num_vectors=7, vector_length=8, topk=2),
        lambda: vn.VBLoRA(2, vectors=7, length=8, k=3, at=AT),
    ),
    "randlora": (lambda: peft.RandLoraConfig(r=6, randlora_alpha=9, target_modules=T), lambda: vn.RandLoRA(4, at="attn.q,ffn.down")),
    "c3a": (
        lambda: peft.C3AConfig(block_size=8, target_modules=T, block_size_pattern={"v_proj": 16}),
        lambda: vn.C3A(8, at="attn.q@0") + vn.C3A(4, at="attn.q@1"),
    ),
    "miss": (lambda: peft.MissConfig(r=5, target_modules=T), lambda: vn.MiSS(7)),
    "miss-mini": (lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=T), lambda: vn.MiSS(4, mini=8)),
    **{
        f"road-{n}": (lambda n=n: peft.RoadConfig(variant=f"road_{n}", group_size=8, target_modules=T), lambda n=n: vn.RoAd(variant=n, group=8, at=AT))
        for n in (1, 2, 4)
    },
    "beft": (lambda: peft.BeftConfig(target_modules=["v_proj"]), lambda: vn.BEFT()),
    "unilora": (
        lambda: peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=T, save_indices=True),
        lambda: vn.UniLoRA(3, length=50, bound=0.5, at="attn.q,ffn.down"),
    ),
    "tinylora": (lambda: peft.TinyLoraConfig(r=2, u=5, target_modules=T), lambda: vn.TinyLoRA(2, u=3, at="attn.q,ffn.down")),
    "tinylora-tied": (lambda: peft.TinyLoraConfig(r=2, u=5, weight_tying=0.5, target_modules=T), lambda: vn.TinyLoRA(2, u=3, share="role", at=AT)),
    "psoft": (lambda: peft.PsoftConfig(r=4, target_modules=T), lambda: vn.PSOFT(6, before=False, at="attn.q,ffn.down")),
    "psoft-free": (
        lambda: peft.PsoftConfig(r=3, psoft_alpha=5, psoft_orth=False, psoft_mag_b=False, ab_svd_init="pissa_init", target_modules=T),
        lambda: vn.PSOFT(3, orthogonal=False, even=True),
    ),
    "psoft-series": (
        lambda: peft.PsoftConfig(r=4, use_cayley_neumann=True, cayley_neumann_eps=0.5, psoft_svd="lowrank", random_seed=3, target_modules=T),
        lambda: vn.PSOFT(4, series=6, constrain=0.3, niter=2, seed=7),
    ),
    "peanut": (lambda: peft.PeanutConfig(r=4, target_modules=T), lambda: vn.PEANuT(3, activation="leakyrelu", scale=0.5, at="attn.q,ffn.down")),
    "peanut-deep": (lambda: peft.PeanutConfig(r=4, depth=2, act_fn="gelu", scaling=2.0, target_modules=T), lambda: vn.PEANuT(3, layers=1)),
    "deft": (lambda: peft.DeftConfig(r=3, target_modules=T), lambda: vn.DEFT(4, projection="qr", alpha=2, at="attn.q,ffn.down")),
    "deft-qr": (lambda: peft.DeftConfig(r=3, alpha=2, decomposition_method="qr", target_modules=T), lambda: vn.DEFT(4, alpha=5)),
    "para": (lambda: peft.DeftConfig(r=3, para=True, decomposition_method="qr", target_modules=T), lambda: vn.DEFT(4, inject=False)),
    "glora": (lambda: peft.GloraConfig(r=3, target_modules=T), lambda: vn.GLoRA(2, c="none")),
    "glora-vector": (
        lambda: peft.GloraConfig(config_A_B="vector", config_C="none", config_D_E="vector", target_modules=T),
        lambda: vn.GLoRA(ab="constant", c="vector"),
    ),
    "adamss": (lambda: peft.AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=T), lambda: vn.AdaMSS(6, subspaces=4, at="attn.q,ffn.down")),
    "adamss-dynamic": (
        lambda: peft.AdamssConfig(r=30, num_subspaces=3, subspace_rank=5, use_dynamic_rank=True, svd_threshold=0.5, random_seed=4, target_modules=T),
        lambda: vn.AdaMSS(99, subspaces=2, rank=6, threshold=0.3, seed=9),
    ),
    "frod": (
        lambda: peft.FrodConfig(target_modules=[*T, "down_proj"], progressbar=False),
        lambda: vn.FRoD(0.05, seed=3, ridge=0.01, at="attn.q,ffn.{up,down}"),
    ),
    "frod-diagonal": (lambda: peft.FrodConfig(target_modules=["q_proj"], sparse_rate=0.0, progressbar=False), lambda: vn.FRoD(0.0, at="ffn.up@0")),
    "osf": (lambda: peft.OSFConfig(effective_rank=20, rank_pattern={"v_proj": 0.5}, target_modules=[*T, "down_proj"]), lambda: vn.OSF(0.75, at="attn.{q,v}")),
    "lily": (lambda: peft.LilyConfig(r=3, stride_A=2, target_modules=T), lambda: vn.Lily(4, experts=3, stride=2, scale=0.5, per="batch", at="attn.q,ffn")),
    "lily-one-layer": (lambda: peft.LilyConfig(r=3, num_B=3, target_modules=["1.self_attn.q_proj"]), lambda: vn.Lily(2, per="batch", at="attn.v@1")),
    "gralora": (lambda: peft.GraloraConfig(r=4, alpha=6, target_modules=T), lambda: vn.GraLoRA(4, k=4)),
    "delora": (lambda: peft.DeloraConfig(r=2, target_modules=T, rank_pattern={"v_proj": 3}), lambda: vn.DeLoRA(2)),
    "hira": (lambda: peft.HiraConfig(r=2, target_modules=T), lambda: vn.HiRA(3, at="attn.v")),
    "adaption-prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
        lambda: vn.LlamaAdapter(5, per_head=False),
    ),
}

CASES |= FURTHER


def both_ways(kind: str, config: Any, plan: vn.Plan, path: Path, **more: Any) -> None:
    """From PEFT here and back; then from here to PEFT and back. `more` is what PEFT's forward wants besides."""
    build, inputs = ZOO[kind].build, ZOO[kind].inputs(2, 7)
    theirs = shaken(build(), config)
    quietly(theirs.save_pretrained, path / "theirs")
    expected = logits(theirs, inputs | more)
    model = build()
    base = logits(model, inputs)
    vn.load(model, path / "theirs", name="mine")
    close(logits(model, inputs), expected, inputs)
    assert base.shape != expected.shape or not torch.allclose(expected, base, atol=1e-4)
    vn.save(model, path / "again", name="mine", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, build(), str(path / "again" / "mine")).eval()
    close(logits(back, inputs | more), expected, inputs)
    vn.detach(model)
    assert torch.equal(logits(model, inputs), base)

    shake(vn.attach(model, plan).parameters(), 1)
    ours = logits(model, inputs)
    assert not torch.allclose(ours, base, atol=1e-4)
    vn.save(model, path / "ours", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, build(), str(path / "ours")).eval()
    close(logits(back, inputs | more), ours, inputs)
    other = build()
    vn.load(other, path / "ours")
    close(logits(other, inputs), ours, inputs)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    config, plan = CASES[case]
    both_ways("llama", config(), plan(), tmp_path, **CALLED.get(case, {}))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning(kind: str, encoder: str, tmp_path: Path) -> None:
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}[kind]
    config = peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type=encoder, encoder_hidden_size=8, task_type=task)
    both_ways(kind, config, vn.PTuning(4, encoder=encoder.lower(), before_cls=True), tmp_path)


TURNED = ["frod", "adalora", "deft", "vera", "fourierft", "vblora", "randlora", "unilora", "tinylora", "gralora", "hira", "waveft", "pvera"]


@pytest.mark.parametrize(("case", "kind"), [*((c, "gpt2") for c in TURNED), ("adalora", "convnext"), ("loha", "convnext")])
def test_other_kinds_of_maps(case: str, kind: str, tmp_path: Path) -> None:
    """Transposed maps and convolutions, where PEFT has them."""
    config, at = CASES[case][0](), {"gpt2": "ffn.up", "convnext": "name:.*patch_embeddings"}[kind]
    config.target_modules = {"c_fc" if kind == "gpt2" else "patch_embeddings"}
    config.fan_in_fan_out = kind == "gpt2"
    config.task_type = None
    config.rank_pattern, config.n_frequency_pattern = {}, {}
    method = dataclasses.replace(next(CASES[case][1]().terms()).method, at=at)
    both_ways(kind, config, method, tmp_path)
    if kind == "gpt2":
        assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_adalora_with_triplets_gone(tmp_path: Path) -> None:
    """After PEFT's last allocation each module keeps its own number of triplets, and the file holds those alone; ours too."""
    inputs = ZOO["llama"].inputs(2, 7)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tfinal=1, total_step=4, lora_alpha=3, target_modules=T, task_type="CAUSAL_LM")
    theirs = shaken(ZOO["llama"].build(), config)
    for step in range(1, 5):
        theirs(**inputs, labels=inputs["input_ids"]).loss.backward()
        theirs.base_model.update_and_allocate(step)
    expected = logits(theirs, inputs)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    mixed_ranks(tmp_path / "theirs", 8)
    model = ZOO["llama"].build()
    vn.load(model, tmp_path / "theirs", name="a")
    close(logits(model, inputs), expected, inputs)
    vn.save(model, tmp_path, name="a", format="peft")
    mixed_ranks(tmp_path / "a", 8)
    close(logits(quietly(peft.PeftModel.from_pretrained, ZOO["llama"].build(), str(tmp_path / "a")).eval(), inputs), expected, inputs)
    vn.detach(model)

    shake(vn.attach(model, vn.AdaLoRA(4, target=1, alpha=6, at=AT), name="b").parameters(), 1)
    for step in (1, 2, 3, 4):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        vn.advance(model, step, 4)
    ours = logits(model, inputs)
    vn.save(model, tmp_path, name="b", format="peft")
    mixed_ranks(tmp_path / "b", 4)
    close(logits(quietly(peft.PeftModel.from_pretrained, ZOO["llama"].build(), str(tmp_path / "b")).eval(), inputs), ours, inputs)
    other = ZOO["llama"].build()
    vn.load(other, tmp_path / "b")
    close(logits(other, inputs), ours, inputs)


def mixed_ranks(folder: Path, total: int) -> None:
    """Modules have different ranks, `total` together, which are those of rank_pattern."""
    ranks = {
        k.removesuffix(".lora_A").removeprefix("base_model.model."): len(v)
        for k, v in load_file(folder / "adapter_model.safetensors").items()
        if k.endswith("lora_A")
    }
    said = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == total, ranks
    assert {k.removesuffix(".lora_E").removeprefix("base_model.model."): sum(v) for k, v in said.items()} == ranks


@pytest.mark.parametrize("case", ["ADALORA", "VERA", "LOHA", "OFT", "BOFT", "HRA", "C3A", "ROAD", "GLORA", "GLORA-none", "ADAMSS"])
def test_with_a_head_beside_on_an_encoder(case: str, tmp_path: Path) -> None:
    config, plan = {
        "ADALORA": (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["query"], task_type="SEQ_CLS"), vn.AdaLoRA(4, target=2)),
        "VERA": (peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), vn.VeRA(3)),
        "LOHA": (peft.LoHaConfig(r=4, alpha=4, target_modules=["query"], task_type="SEQ_CLS"), vn.LoHa(3)),
        "OFT": (peft.OFTConfig(oft_block_size=4, target_modules=["query", "dense"], task_type="SEQ_CLS"), vn.OFT(4)),
        "BOFT": (peft.BOFTConfig(boft_block_size=4, target_modules=["query"], task_type="SEQ_CLS"), vn.BOFT(4)),
        "HRA": (peft.HRAConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), vn.HRA(4)),
        "C3A": (peft.C3AConfig(block_size=8, target_modules=["query"], task_type="SEQ_CLS"), vn.C3A(8)),
        "ADAMSS": (peft.AdamssConfig(r=8, target_modules=["query"], task_type="SEQ_CLS"), vn.AdaMSS(8, subspaces=3)),
        "GLORA": (peft.GloraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"), vn.GLoRA(2, ab="vector", c="vector", de="vector")),
        "GLORA-none": (peft.GloraConfig(config_A_B="none", target_modules=["query"], task_type="SEQ_CLS"), vn.GLoRA(ab="none", c="none")),
        "ROAD": (peft.RoadConfig(variant="road_1", group_size=8, target_modules=["query"], task_type="SEQ_CLS"), vn.RoAd(group=8, at="attn.v")),
    }[case]
    both_ways("bert", config, plan + vn.Full(at="head"), tmp_path)


@pytest.mark.parametrize("stride", [1, 2])
def test_lily_where_kinds_are_named_otherwise(stride: int, tmp_path: Path) -> None:
    """PEFT's 'q' is three roles of T5; ours are written module by module, since it would share their B."""
    config = peft.LilyConfig(r=3, stride_A=stride, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    both_ways("t5", config, vn.Lily(3, stride=stride, per="batch", at="attn.q,cross.q"), tmp_path)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["stride_A"] == 1 and len(written["target_modules"]) == 6
    config = peft.LilyConfig(r=3, target_modules=["0.self_attn.q_proj", "1.self_attn.q_proj"])
    quietly(shaken(ZOO["llama"].build(), config).save_pretrained, tmp_path / "single")
    with refuses(vn.StoreError, "target_modules=.*a B that is not its kind's", "Name the kinds"):
        vn.load(ZOO["llama"].build(), tmp_path / "single")


def test_frods_basis_must_be_the_one_that_peft_makes(tmp_path: Path) -> None:
    """PEFT takes an encoder's and a decoder's layers of one number for one; and a shared basis of ours may have other signs."""
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs(2, 7)
    adapter = vn.attach(model, vn.FRoD(0.1))
    shake(adapter.parameters(), 1)
    with torch.no_grad():
        for v in (b for n, b in adapter.parts[0].named_buffers() if n.startswith("V_")):
            v[:, ::2] *= -1
        for part in adapter.parts:
            part.derive()
    expected = logits(model, inputs)
    vn.save(model, tmp_path / "signs", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, ZOO["llama"].build(), str(tmp_path / "signs")).eval()
    close(logits(back, inputs), expected, inputs)
    model = ZOO["t5"].build()
    vn.attach(model, vn.FRoD(0.1, at="attn.q"))
    with refuses(vn.CapabilityError, "make the shared basis of .*again from the base", "native"):
        vn.save(model, tmp_path / "t5", format="peft")
    both_ways("t5", peft.FrodConfig(target_modules=["wo"], progressbar=False), vn.FRoD(0.1, at="decoder/attn.q"), tmp_path)
    config = peft.FrodConfig(target_modules=T, progressbar=False, save_projection=False)
    quietly(shaken(ZOO["llama"].build(), config).save_pretrained, tmp_path / "without")
    with refuses(vn.StoreError, "'frod_V.self_attn_q_proj' is not in the file", "save_projection=True"):
        vn.load(ZOO["llama"].build(), tmp_path / "without")


@pytest.mark.parametrize("case", ["psoft", "osf"])
def test_what_is_made_of_the_base_again_must_be_what_it_was(case: str, tmp_path: Path) -> None:
    """Signs of singular vectors are free; anything else is refused, and so is a base with adapters merged into it."""
    model = ZOO["llama"].build()
    adapter = vn.attach(model, vn.PSOFT(4) if case == "psoft" else vn.OSF(0.5))
    shake(adapter.parameters(), 1)
    inputs = ZOO["llama"].inputs(2, 7)
    vn.merge(model)
    with refuses(vn.CapabilityError, "stores numbers of the base", "unmerge"):
        vn.save(model, tmp_path / "merged", name="default", format="peft")
    vn.unmerge(model)
    part = adapter.parts[0]
    if case == "psoft":
        with torch.no_grad():
            part.A[1] *= -1
            part.B[:, 1] *= -1
        expected = logits(model, inputs)
        vn.save(model, tmp_path / "signs", format="peft")
        back = quietly(peft.PeftModel.from_pretrained, ZOO["llama"].build(), str(tmp_path / "signs")).eval()
        close(logits(back, inputs), expected, inputs)
    with torch.no_grad():
        (part.B if case == "psoft" else part.S0).mul_(1.01)
    with refuses(vn.CapabilityError, "make the .*singular .*again from the base", "native"):
        vn.save(model, tmp_path / "other", format="peft")


def test_multitask(tmp_path: Path) -> None:
    """PEFT wants to be told the task of every example: the first, in a file of one."""
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=1, num_ranks=2, task_type="CAUSAL_LM")
    both_ways("llama", config, vn.MultitaskPrompt(4, rank=3), tmp_path, task_ids=torch.zeros(2, dtype=torch.long))
    spoil(tmp_path / "theirs", tensors=lambda t: t.update({k: torch.cat([t[k]] * 2) for k in ("prefix_task_cols", "prefix_task_rows")}))
    with refuses(vn.StoreError, "holds 2 tasks", "EXACT_SOURCE_TASK"):
        vn.load(ZOO["llama"].build(), tmp_path / "theirs")
    model = ZOO["t5"].build()
    vn.attach(model, vn.MultitaskPrompt(4))
    with refuses(vn.CapabilityError, "before the decoder's input too", "native"):
        vn.save(model, tmp_path / "t5", format="peft")


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_are_refused_and_leave_the_model_alone(case: str, tmp_path: Path) -> None:
    """Every tensor one entry short, or away; the model is as it was, and takes the whole file afterwards."""
    model = ZOO["llama"].build()
    inputs = ZOO["llama"].inputs(2, 7)
    base = logits(model, inputs)
    quietly(shaken(ZOO["llama"].build(), CASES[case][0]()).save_pretrained, tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    tensors = load_file(tmp_path / "adapter_model.safetensors").items()
    names = list(dict.fromkeys(re.sub(r".*layers\.\d+\.[^.]+\.[^.]+\.", "", k) for k, v in tensors if v.numel()))
    for name in names:
        if name in ("randlora_A", "randlora_B", "delora_w_norm"):
            continue  # each module's own copy of what stands once, and what is the base's
        for cut in (lambda t, k: t[k].flatten()[:-1].clone(), None):
            (tmp_path / "adapter_model.safetensors").write_bytes(whole)
            spoil(tmp_path, tensors=lambda t, n=name, c=cut: [t.update({k: c(t, k)}) if c else t.pop(k) for k in list(t) if k.endswith(n)][:0])
            with pytest.raises(vn.StoreError, match="adapter_config|adapter_model|" + str(tmp_path)):
                vn.load(model, tmp_path)
            assert torch.equal(logits(model, inputs), base), name
    (tmp_path / "adapter_model.safetensors").write_bytes(whole)
    vn.load(model, tmp_path)


REFUSED: list[tuple[str, Callable[[], vn.Plan], str, str]] = [
    ("llama", lambda: vn.LoHa(2) + vn.LoHa(3), "LOHA has one adapter a module", "native"),
    ("gpt2", lambda: vn.HRA(2), "HRA cannot express hra at .*a slice of a fused", "native"),
    ("gpt2", lambda: vn.LoHa(2, at="attn.o"), "of kind 'transposed'", "native"),
    ("llama", lambda: vn.VeRA(4, at="attn.q") + vn.VeRA(4, at="attn.v"), "shares vera_A and vera_B among all modules", "native"),
    ("llama", lambda: vn.OFT(4, at="attn.q") + vn.OFT(8, at="attn.v"), "OFT has one oft_block_size for all modules", "native"),
    ("llama", lambda: vn.BOFT(4, factors=2), "BOFT has nothing like this but with boft_n_butterfly_factor=1; here it is 2", "native"),
    ("llama", lambda: vn.Magnitude(0.01), "counts entries as r", "RandomMask"),
    ("llama", lambda: vn.LlamaAdapter(2), "one gate a layer", "per_head=False"),
    ("llama", lambda: vn.LlamaAdapter(2, per_head=False, at="attn@0"), "topmost layers", "native"),
    ("llama", lambda: vn.Lily(2), "LILY routes all tokens of a batch alike", "per='batch'"),
    ("bert", lambda: vn.PTuning(2), "before the CLS token", "vn.PTuning"),
]


@pytest.mark.parametrize(("kind", "plan", "what", "fix"), [*REFUSED, *UNSAID], ids=[r[2] for r in [*REFUSED, *UNSAID]])
def test_what_peft_cannot_say(kind: str, plan: Callable[[], vn.Plan], what: str, fix: str, tmp_path: Path) -> None:
    model = ZOO[kind].build()
    vn.attach(model, plan())
    with refuses(vn.CapabilityError, what, fix):
        vn.save(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "why", "way_out"), [("XLORA", "first run of the whole base", "vn.mixture"), ("SHADOW", "second transformer", "vn.Ladder")])
def test_types_that_are_no_deviation(kind: str, why: str, way_out: str, tmp_path: Path) -> None:
    """Files that PEFT itself wrote are refused with the reason, and the model is as it was."""
    base = ZOO["llama"].build()
    config: Any = peft.ShadowConfig(task_type="CAUSAL_LM")
    if kind == "XLORA":
        quietly(shaken(ZOO["llama"].build(), peft.LoraConfig(r=2, target_modules=T)).save_pretrained, tmp_path / "lora")
        base.config.use_cache = False
        config = peft.XLoraConfig(hidden_size=32, adapters={"0": str(tmp_path / "lora")}, task_type="CAUSAL_LM")
    quietly(quietly(peft.get_peft_model, base, config).save_pretrained, tmp_path / "theirs")
    model = ZOO["llama"].build()
    with refuses(vn.StoreError, f"PEFT's {kind} cannot be read here", why, way_out, model=model):
        vn.load(model, tmp_path / "theirs")
