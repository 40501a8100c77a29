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
    "lora-data": lambda: vn.LoRA(4, at="attn", init="eva") + vn.LoRA(2, at="ffn", init="lora-ga"),
    "loftq": lambda: vn.LoftQ(4, at="linear"),
    "dora": lambda: vn.DoRA(2, at="all"),
    "adalora": lambda: vn.AdaLoRA(2, target=1, at="all"),
    "vera": lambda: vn.VeRA(8, at="all"),
    "tied-lora": lambda: vn.TiedLoRA(4, at="all"),
    "vblora": lambda: vn.VBLoRA(2, vectors=6, length=8, bound=0.2, at="linear"),
    "randlora": lambda: vn.RandLoRA(6, at="linear"),
    "lora-xs": lambda: vn.LoRAXS(2, at="all"),
    "tinylora": lambda: vn.TinyLoRA(2, u=5, share="role", at="all"),
    "moslora": lambda: vn.MoSLoRA(2, at="all"),
    "unilora": lambda: vn.UniLoRA(2, length=40, bound=1.0, at="linear"),
    "loretta": lambda: vn.LoRETTA(2, t=3, cores=2, at="linear"),
    "gated-low-rank": lambda: vn.gated(vn.VeRA(8) + vn.TiedLoRA(4) + vn.VBLoRA(2, vectors=6, length=8, bound=0.3) + vn.RandLoRA(6) + vn.AdaLoRA(4, target=2)),
    "gated-dora": lambda: vn.gated(vn.DoRA(2, at="linear", init="pissa")),
    "last-layer": lambda: vn.Full(at="ffn.*@-1:"),
    "loha": lambda: vn.LoHa(2, alpha=3, at="all"),
    "lokr": lambda: vn.LoKr(2, alpha=3, at="all"),
    "fourierft": lambda: vn.FourierFT(20, at="all"),
    "c3a": lambda: vn.C3A(8, at="linear"),
    "miss": lambda: vn.MiSS(5, at="linear"),
    "road": lambda: vn.RoAd(group=8),
    "oft": lambda: vn.OFT(4, at="linear"),
    "boft": lambda: vn.BOFT(4, factors=2, at="linear"),
    "hra": lambda: vn.HRA(4, at="all,!head"),
    "gralora": lambda: vn.GraLoRA(4, at="linear"),
    "delora": lambda: vn.DeLoRA(2, at="linear"),
    "hira": lambda: vn.HiRA(2, at="linear"),
    "norm": lambda: vn.NormTuning(),
    "last-layers": lambda: vn.LastLayers(1),
    "magnitude": lambda: vn.Magnitude(0.05, at="all"),
    "random": lambda: vn.RandomMask(0.05, at="linear"),
    "gradient": lambda: vn.GradientMask(0.05, at="linear"),
    "fisher": lambda: vn.FisherMask(0.05, at="linear"),
    "lottery": lambda: vn.LotteryTicket(0.05, at="linear"),
    "tokens": lambda: vn.TrainableTokens(tuple(range(5, 97)), at="embed"),
    "beft": lambda: vn.BEFT(at="attn.{v,o}"),
    "bottleneck-layer": lambda: vn.Bottleneck(4, at="layer", drop=1),
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
    "p-tuning": lambda: vn.PTuning(3, hidden=8),
    "p-tuning-lstm": lambda: vn.PTuning(3, encoder="lstm", hidden=8),
    "multitask": lambda: vn.MultitaskPrompt(3),
}

# why a method refuses a kind of model: a part of the error's text
REFUSALS: dict[str, str] = {}
