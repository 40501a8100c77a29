"""Plans that have a name in the literature."""

from __future__ import annotations

from collections.abc import Callable

from .errors import PlanError, did_you_mean
from .plan import Plan, gated, short


def _presets() -> dict[str, Callable[[], Plan]]:
    from .compose.paced import paced
    from .methods import IA3, BitFit, Bottleneck, Compacter, Full, Invertible, LlamaAdapter, LoRA, LoReFT, Prefix, PromptTuning, PTuning

    return {
        "lora": lambda: LoRA(8),
        "ia3": lambda: IA3(),
        "bitfit": lambda: BitFit(),
        "prefix": lambda: Prefix(10),
        "prompt": lambda: PromptTuning(10),
        "bottleneck": lambda: Bottleneck(48),
        "pfeiffer": lambda: Bottleneck(reduction=16, activation="relu", at="ffn"),
        "houlsby": lambda: Bottleneck(reduction=16, activation="swish", at="attn,ffn"),
        "parallel": lambda: Bottleneck(reduction=2, activation="relu", parallel=True, scale=4.0, at="ffn"),
        "mam": lambda: Prefix(30, reparameterize=800) + Bottleneck(reduction=2, activation="relu", parallel=True, scale=4.0, at="ffn"),
        "unipelt-ap": lambda: gated(Bottleneck(48) + Prefix(10)),
        "unipelt-apl": lambda: gated(Bottleneck(48) + Prefix(10) + LoRA(8, alpha=16)),
        "gated": lambda: gated(Bottleneck(12) + paced(Prefix(5), 10) + paced(LoRA(4), 2) + paced(IA3(), 20), bias=3.0, rate=10.0),
        "head": lambda: Full(at="head"),
        "full": lambda: Full(at="all"),
        "compacter": lambda: Compacter(),
        "compacter++": lambda: Compacter(at="ffn"),
        "adapterdrop": lambda: Bottleneck(reduction=16, activation="relu", at="ffn", drop=11),
        "llama-adapter": lambda: LlamaAdapter(10),
        "loreft": lambda: LoReFT(8, positions="first:7+last:7"),
        "mad-x": lambda: Invertible() + Bottleneck(reduction=2, activation="relu", at="ffn"),
        "p-tuning": lambda: PTuning(20, encoder="lstm"),
        "p-tuning-v2": lambda: Prefix(20),
        "p-tuning-v2-mlp": lambda: Prefix(20, reparameterize=512),
        "t-few": lambda: IA3(at="attn.{k,v},cross.{k,v},ffn.down"),
    }


def preset(name: str, where: str = "") -> Plan:
    """The plan that the literature knows by `name`.

    lora        LoRA(8) on q and v (Hu et al. 2021)
    ia3         (IA)3 on keys, values and the FFN's inner activation (Liu et al. 2022)
    bitfit      biases only (Ben Zaken et al. 2022)
    prefix      10 keys and values a layer (Li & Liang 2021); prompt: 10 input vectors (Lester et al. 2021)
    bottleneck  size 48 after the FFN, as UniPELT uses it
    pfeiffer    after the FFN, reduction 16, ReLU (Pfeiffer et al. 2021)
    houlsby     after attention and FFN, reduction 16, swish (Houlsby et al. 2019, as AdapterHub's double_seq_bn)
    parallel    beside the FFN, reduction 2, ReLU, scale 4; mam: that with prefix 30 through an MLP of 800 (He et al. 2022)
    unipelt-ap  gated bottleneck 48 and prefix 10; unipelt-apl: with LoRA 8 too (Mao et al. 2022)
    gated       ours: bottleneck 12, prefix 5, LoRA 4 and (IA)3 under gates that start open, each at a rate of its own; level
                with the best single method where it was measured (docs/evidence.md)
    head        the head's own tensors; full: all tensors, which is ordinary fine-tuning (saved whole, as large as the base)
    compacter   Kronecker bottlenecks after attention and FFN; compacter++: after the FFN alone (Mahabadi et al. 2021)
    adapterdrop pfeiffer, of which training leaves out the 0 to 11 lowest layers at random (Rücklé et al. 2021)
    llama-adapter  10 prompts faded in, in the topmost 30 layers (Zhang et al. 2024)
    loreft      rank 8 in every layer, at the first and last 7 tokens: the paper's on commonsense reasoning (Wu et al. 2024)
    mad-x       a language's adapter: invertible embeddings and reduction 2 after the FFN (Pfeiffer et al. 2020)
    p-tuning    20 input vectors out of an LSTM (Liu et al. 2021)
    p-tuning-v2 20 keys and values in every layer; p-tuning-v2-mlp: through an MLP of 512. With a classification head on the
                first token, as a sequence classifier has it (Liu et al. 2022)
    t-few       (IA)3 on an encoder-decoder, cross-attention too, as T-Few trains it, with the task `choices`
                (Liu et al. 2022)

    Raises: PlanError for an unknown name, with the nearest.
    """
    known = _presets()
    if not isinstance(name, str) or name not in known:
        raise PlanError(f"there is no preset {short(name)}", where=where, fix=did_you_mean(str(name), known))
    return known[name]()
