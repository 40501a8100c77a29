"""The contract suite's table of methods beyond the core's: one line each, run on five representative kinds of model.

A covering design keeps the suite affordable: every method on these kinds, every kind of model on the core's methods.
"""

from __future__ import annotations

import veneer as vn

# an encoder, a decoder with grouped queries, one with fused qkv, an encoder-decoder, a vision encoder
REPRESENTATIVE = ("bert", "llama", "gpt2", "t5", "vit")

CATALOGUE = {
    # low-rank
    "lora-options": lambda: vn.LoRA(4, at="linear", rank_stabilized=True, b_rate=16.0, freeze_a=True, ranks={"attn.q": 2}, alphas={"ffn": 3.0}),
    "lora-starts": lambda: (
        vn.LoRA(2, init="pissa", at="attn.q,ffn")
        + vn.LoRA(2, init="olora", at="attn.k")
        + vn.LoRA(2, init="mica", at="attn.v")
        + vn.LoRA(2, init="orthogonal", at="attn.o")
    ),
    "lora-data": lambda: vn.LoRA(4, at="attn", init="eva") + vn.LoRA(2, at="ffn.up", init="lora-ga") + vn.LoRA(2, at="ffn.down", init="corda"),
    "loftq": lambda: vn.LoftQ(4, at="linear"),
    "dora": lambda: vn.DoRA(2, at="all"),
    "adalora": lambda: vn.AdaLoRA(2, target=1, at="all"),
    "vera": lambda: vn.VeRA(8, at="all"),
    "pvera": lambda: vn.PVeRA(8, kl=1e-3, at="linear,embed"),
    "tied-lora": lambda: vn.TiedLoRA(4, at="all"),
    "vblora": lambda: vn.VBLoRA(2, vectors=6, length=8, bound=0.2, at="linear"),
    "randlora": lambda: vn.RandLoRA(6, at="linear"),
    "lora-xs": lambda: vn.LoRAXS(2, at="all"),
    "tinylora": lambda: vn.TinyLoRA(2, u=5, share="role", at="all"),
    "moslora": lambda: vn.MoSLoRA(2, at="all"),
    "poly": lambda: vn.Poly(2, splits=2, at="linear"),
    "gated-poly": lambda: vn.gated(vn.Poly(2, skills=3)),
    "unilora": lambda: vn.UniLoRA(2, length=40, bound=1.0, at="linear"),
    "loretta": lambda: vn.LoRETTA(2, t=3, cores=2, at="linear"),
    "gated-low-rank": lambda: vn.gated(vn.VeRA(8) + vn.TiedLoRA(4) + vn.VBLoRA(2, vectors=6, length=8, bound=0.3) + vn.RandLoRA(6) + vn.AdaLoRA(4, target=2)),
    "gated-dora": lambda: vn.gated(vn.DoRA(2, at="linear", init="pissa")),
    "last-layer": lambda: vn.Full(at="ffn.*@-1:"),
    "loha": lambda: vn.LoHa(2, alpha=3, at="all"),
    "lokr": lambda: vn.LoKr(2, alpha=3, at="all"),
    "fourierft": lambda: vn.FourierFT(20, at="all"),
    "waveft": lambda: vn.WaveFT(20, at="all"),
    "waveft-db3": lambda: vn.WaveFT(20, wavelet="db3", at="linear") + vn.WaveFT(9, wavelet=None, at="linear"),
    "c3a": lambda: vn.C3A(8, at="linear"),
    "miss": lambda: vn.MiSS(5, at="linear"),
    "road": lambda: vn.RoAd(group=8),
    "oft": lambda: vn.OFT(4, at="linear"),
    "boft": lambda: vn.BOFT(4, factors=2, at="linear"),
    "hra": lambda: vn.HRA(4, at="all,!head"),
    "gralora": lambda: vn.GraLoRA(4, at="linear"),
    "delora": lambda: vn.DeLoRA(2, at="linear"),
    "hira": lambda: vn.HiRA(2, at="linear"),
    "psoft": lambda: vn.PSOFT(4, at="all"),
    "peanut": lambda: vn.PEANuT(4, layers=2, activation="gelu", at="all"),
    "gated-psoft": lambda: vn.gated(vn.PSOFT(4, orthogonal=False) + vn.PEANuT(4, activation="tanh")),
    "deft": lambda: vn.DEFT(3, alpha=2, at="all"),
    "deft-qr": lambda: vn.DEFT(2, projection="qr", at="linear"),
    "glora": lambda: vn.GLoRA(2, at="linear"),
    "glora-vectors": lambda: vn.GLoRA(ab="vector", c="vector", de="vector", at="all"),
    "gated-deft": lambda: vn.gated(vn.DEFT(3, projection="qr", inject=False) + vn.GLoRA(ab="constant", c="none", de="none")),
    "osf": lambda: vn.OSF(0.6, at="all"),
    "osf-keep": lambda: vn.OSF(2, at="linear,!head"),
    "lily": lambda: vn.Lily(4, experts=3, stride=2, at="linear"),
    "lily-batch": lambda: vn.Lily(4, per="batch"),
    "gated-osf": lambda: vn.gated(vn.OSF(0.5) + vn.Lily(3)),
    "adamss": lambda: vn.AdaMSS(8, subspaces=3, rank=2, at="all"),
    "gated-adamss": lambda: vn.gated(vn.AdaMSS(8, subspaces=3, rank=2, threshold=0.1)),
    "frod": lambda: vn.FRoD(0.02, at="linear"),
    "gated-frod": lambda: vn.gated(vn.FRoD(0.02)),
    "norm": lambda: vn.NormTuning(),
    "last-layers": lambda: vn.LastLayers(1),
    "magnitude": lambda: vn.Magnitude(0.05, at="all"),
    "super": lambda: vn.SuperTuning(0.05, smallest=True),
    "supra": lambda: vn.SuperTuning(0.05, r=2),
    "gated-supra": lambda: vn.gated(vn.SuperTuning(0.05, r=2)),
    "random": lambda: vn.RandomMask(0.05, at="linear"),
    "gradient": lambda: vn.GradientMask(0.05, at="linear"),
    "fisher": lambda: vn.FisherMask(0.05, at="linear"),
    "lottery": lambda: vn.LotteryTicket(0.05, at="linear"),
    "tokens": lambda: vn.TrainableTokens(tuple(range(5, 97)), at="embed"),
    "beft": lambda: vn.BEFT(at="attn.{v,o}"),
    "bottleneck-layer": lambda: vn.Bottleneck(4, at="layer", drop=1),
    "bottleneck-residual": lambda: vn.Bottleneck(4, residual=True, activation="gelu", at="attn,ffn") + vn.gated(vn.Bottleneck(3, residual=True, parallel=True)),
    "gated-residual": lambda: vn.gated(vn.Bottleneck(4, residual=True, activation="gelu")),
    "compacter": lambda: vn.Compacter(size=8, rank=2),
    "gated-compacter": lambda: vn.gated(vn.Compacter(size=4, n=2)),
    "llama-adapter": lambda: vn.LlamaAdapter(3),
    "gated-llama-adapter": lambda: vn.gated(vn.LlamaAdapter(3, per_head=False)),
    "loreft": lambda: vn.LoReFT(3),
    "loreft-positions": lambda: vn.LoReFT(2, positions="first:2+last:1"),
    "gated-loreft": lambda: vn.gated(vn.LoReFT(2), per="token"),
    "direft": lambda: vn.DiReFT(3, positions="first:1+last:2"),
    "direft-orthogonal": lambda: vn.DiReFT(3, orthogonal=True),
    "invertible": lambda: vn.Invertible(),
    "ladder": lambda: vn.Ladder(reduction=4),
    "gated-ladder": lambda: vn.gated(vn.Ladder(reduction=4)),
    "cartridge": lambda: vn.Cartridge(3, sink=2, positions=False, at="all"),
    "gated-cartridge": lambda: vn.gated(vn.Cartridge(3, sink=0, init_std=0.1, positions=False)),
    "cpt": lambda: vn.CPT((5, 9, 7, 6), kinds=(1, 2, 3, 4), context=0, bound=9.0, format=9.0),
    "p-tuning": lambda: vn.PTuning(3, hidden=8),
    "p-tuning-lstm": lambda: vn.PTuning(3, encoder="lstm", hidden=8),
    "multitask": lambda: vn.MultitaskPrompt(3),
}

# why a method refuses a kind of model: a part of the error's text
REFUSALS: dict[str, str] = {"cpt": "needs a token embedding"}
