"""Plans that have a name in the literature."""

from __future__ import annotations

from collections.abc import Callable

from .errors import PlanError, did_you_mean
from .plan import Plan, gated, short


def _presets() -> dict[str, Callable[[], Plan]]:
    from .methods import IA3, BitFit, Bottleneck, Full, LoRA, Prefix, PromptTuning

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
        "head": lambda: Full(at="head"),
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
    head        the head's own tensors

    Raises: PlanError for an unknown name, with the nearest.
    """
    known = _presets()
    if not isinstance(name, str) or name not in known:
        raise PlanError(f"there is no preset {short(name)}", where=where, fix=did_you_mean(str(name), known))
    return known[name]()
