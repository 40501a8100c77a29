"""Learning rates by method, where a configuration gives none: AdamW, and where each rate comes from."""

from __future__ import annotations

from ..plan import Plan

# Light methods want more than full fine-tuning's 2e-5, and the fewer parameters a method has, the more. (rate, source)
RATES: dict[str, tuple[float, str]] = {
    "lora": (5e-4, "UniPELT's for LoRA, 5e-4 (Mao et al. 2022, A.1); Hu et al. 2021, D take 2e-4 to 5e-4"),
    "vera": (4e-3, "VeRA, 4e-3 to 1e-2 on GLUE (Kopiczko et al. 2024)"),
    "vblora": (1e-2, "VB-LoRA's for its logits, 0.01; its bank gets a tenth (Li et al. 2024)"),
    "bottleneck": (5e-4, "UniPELT's for all submodules together, 5e-4; alone 1e-4 (Mao et al. 2022, A.1)"),
    "prefix": (5e-3, "P-tuning v2, 5e-3 to 1e-2 without an MLP (Liu et al. 2021)"),
    "prompt": (1e-2, "between P-tuning v2's and prompt tuning's 0.3 with Adafactor (Lester et al. 2021)"),
    "ia3": (3e-3, "T-Few, 3e-3 (Liu et al. 2022)"),
    "compacter": (3e-3, "Compacter, 3e-3 (Mahabadi et al. 2021)"),
    "loreft": (9e-4, "LoReFT on commonsense reasoning, 9e-4 (Wu et al. 2024)"),
    "direft": (9e-4, "as LoReFT"),
    "multitask-prompt": (1e-2, "as prompt tuning here; the paper takes 0.3 (Wang et al. 2023)"),
    "bitfit": (1e-3, "BitFit, 1e-4 to 1e-2 (Ben Zaken et al. 2022)"),
    "full": (1e-3, "a fresh head on a frozen body, as linear probes take"),
}
DEFAULT = (5e-4, "LoRA's, for a method without a rate of its own")


def rate_of(plan: Plan) -> float:
    """The default rate of `plan`: the smallest among its methods'; a head's own counts only where it is alone."""
    return choose(plan)[0]


def choose(plan: Plan) -> tuple[float, str]:
    """(rate, 'method: source') of the method that decides."""
    names = [m.name for m in plan.leaves()]
    body = [n for n in names if n != "full"] or names
    decides = min(body, key=lambda n: RATES.get(n, DEFAULT)[0])
    rate, source = RATES.get(decides, DEFAULT)
    return rate, f"{decides}: {source}"
