"""PEFT's further types, both ways against the installed PEFT: the same files give the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer as vn
from test_peft_format import close, logits, quietly, shake, shaken
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
    "gralora": (lambda: peft.GraloraConfig(r=4, alpha=6, target_modules=T), lambda: vn.GraLoRA(4, k=4)),
    "delora": (lambda: peft.DeloraConfig(r=2, target_modules=T, rank_pattern={"v_proj": 3}), lambda: vn.DeLoRA(2)),
    "hira": (lambda: peft.HiraConfig(r=2, target_modules=T), lambda: vn.HiRA(3, at="attn.v")),
    "adaption-prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
        lambda: vn.LlamaAdapter(5, per_head=False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    """From PEFT here and back; then from here to PEFT and back."""
    config, plan = CASES[case]
    build, inputs = ZOO["llama"].build, ZOO["llama"].inputs(2, 7)
    theirs = shaken(build(), config())
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    expected = logits(theirs, inputs)
    model = build()
    base = logits(model, inputs)
    vn.load(model, tmp_path / "theirs", name="mine")
    close(logits(model, inputs), expected, inputs)
    assert not torch.allclose(expected, base, atol=1e-4)
    vn.save(model, tmp_path / "again", name="mine", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, build(), str(tmp_path / "again" / "mine")).eval()
    close(logits(back, inputs), expected, inputs)
    vn.detach(model)
    assert torch.equal(logits(model, inputs), base)

    shake(vn.attach(model, plan()).parameters(), 1)
    ours = logits(model, inputs)
    assert not torch.allclose(ours, base, atol=1e-4)
    vn.save(model, tmp_path / "ours", format="peft")
    back = quietly(peft.PeftModel.from_pretrained, build(), str(tmp_path / "ours")).eval()
    close(logits(back, inputs), ours, inputs)
    other = build()
    vn.load(other, tmp_path / "ours")
    close(logits(other, inputs), ours, inputs)
