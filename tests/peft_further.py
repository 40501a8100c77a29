"""Cases of PEFT's further types for test_peft_codecs.py: a config of theirs, a plan of ours that PEFT can express."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch

import veneer as vn
from test_peft_format import quietly

T = ["q_proj", "v_proj"]
AT = "attn.{q,v}"

FURTHER: dict[str, tuple[Callable[[], Any], Callable[[], vn.Plan]]] = {
    "waveft": (
        lambda: peft.WaveFTConfig(n_frequency=40, scaling=9, target_modules=T, n_frequency_pattern={"v_proj": 20}),
        lambda: vn.WaveFT(40, at="attn.q") + vn.WaveFT(30, at="attn.v"),
    ),
    "waveft-sym4": (
        lambda: peft.WaveFTConfig(n_frequency=40, wavelet_family="sym4", random_loc_seed=3, target_modules=[*T, "down_proj"]),
        lambda: vn.WaveFT(50, wavelet="coif1", scale=3, seed=5, at="attn.q,ffn.up"),
    ),
    "waveft-plain": (lambda: peft.WaveFTConfig(n_frequency=40, use_idwt=False, target_modules=T), lambda: vn.WaveFT(50, wavelet=None)),
    "pvera": (lambda: peft.PveraConfig(r=6, target_modules=[*T, "down_proj"]), lambda: vn.PVeRA(4, start=0.3, at="attn.v,ffn.up")),
    "super": (lambda: peft.SupertuningConfig(sparsity=0.97, target_modules=[*T, "down_proj"]), lambda: vn.SuperTuning(0.013, smallest=True)),
    "super-computed": (
        lambda: quietly(peft.SupertuningConfig, sparsity=0.97, select_top=False, save_precomputed_indices=False, target_modules=T),
        lambda: vn.SuperTuning(k=77, at="attn.q"),
    ),
    "supra": (lambda: peft.SupertuningConfig(sparsity=0.97, r=3, lora_alpha=5, target_modules=T), lambda: vn.SuperTuning(0.02, r=2)),
    "cartridge": (
        lambda: peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, task_type="CAUSAL_LM"),
        lambda: vn.Cartridge(4, sink=0),
    ),
    "cpt": (
        lambda: peft.CPTConfig(
            cpt_token_ids=[5, 9, 7, 6, 11], cpt_tokens_type_mask=[1, 2, 3, 4, 5], opt_projection_epsilon=2.0, opt_loss_decay_factor=0.9,
            opt_weighted_loss_type="decay", task_type="CAUSAL_LM",
        ),
        lambda: vn.CPT((5, 9, 8), bound=1.0),
    ),
    "poly": (
        lambda: peft.PolyConfig(r=3, n_skills=3, n_splits=2, target_modules=T, task_type="CAUSAL_LM"),
        lambda: vn.Poly(2, alpha=3, at="attn.q,ffn.down"),
    ),
}  # fmt: skip

CALLED = {"poly": {"task_ids": torch.zeros(2, dtype=torch.long)}}  # what PEFT's forward wants besides

# kind of model, plan, what is refused, the way out
UNSAID: list[tuple[str, Callable[[], vn.Plan], str, str]] = [
    ("bert", lambda: vn.CPT((5, 9), context=0), "has a cpt for CAUSAL_LM alone", "native"),
    ("llama", lambda: vn.SuperTuning(0.01, per="model", at="linear"), "one share for all modules", "native"),
    ("llama", lambda: vn.WaveFT(9, wavelet="coif5"), "wavelet='coif5': PEFT's coif4 and coif5 are other filters", "native"),
]
