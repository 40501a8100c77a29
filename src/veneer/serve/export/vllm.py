"""A LoRA adapter for vLLM: Hugging Face PEFT's files, of which it reads a part.

vLLM takes r, lora_alpha and target_modules from the configuration and scales every map by alpha / r (alpha / sqrt(r) with
use_rslora); patterns of ranks and alphas it does not read. Each tensor must be a map's lora_A.weight or lora_B.weight, of a rank up to
its --max-lora-rank. It has no DoRA, no biases and no modules saved whole.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import CapabilityError
from ...files import read_tensors
from ..opened import Opened
from . import Target, peft

KEY = re.compile(r"base_model\.model\.(?P<map>.+)\.lora_(?P<side>[AB])\.weight")
LARGEST = 512  # of the values that --max-lora-rank may have


def flaws(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What vLLM would refuse, or read as something else, in PEFT's `config` and tensors of these `shapes`."""
    out = [] if config.get("peft_type") == "LORA" else [f"its files hold LoRA, and this is {config.get('peft_type')}"]
    out += [f"it needs {name}" for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if config.get("use_dora"):
        out.append("it has no DoRA")
    if config.get("modules_to_save"):
        out.append(f"it loads no modules saved whole: {', '.join(config['modules_to_save'])}")
    if config.get("bias", "none") != "none":
        out.append("it loads no biases")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            out.append(f"it does not read {name}: one rank and one alpha for all maps")
    strange = [key for key in shapes if KEY.fullmatch(key) is None]
    if strange:
        out.append(f"it has no place for {strange[0]}")
    ranks = {shapes[key][found["side"] == "B"] for key in shapes if (found := KEY.fullmatch(key)) is not None}
    if ranks and max(ranks) > LARGEST:
        out.append(f"rank {max(ranks)} is over its {LARGEST}")
    return out


def write(opened: Opened, folder: Path) -> Path:
    """PEFT's two files. Raises: CapabilityError for what vLLM does not read."""
    path = peft.write(opened, folder)
    shapes = {key: tuple(t.shape) for key, t in read_tensors(path / "adapter_model.safetensors").items()}
    found = flaws(json.loads((path / "adapter_config.json").read_text()), shapes)
    if found:
        fix = "Serve the merged checkpoint (veneer merge), or attach LoRA of one rank alone; `veneer serve` serves any plan"
        raise CapabilityError(f"vLLM cannot serve this adapter: {'; '.join(found)}", fix=fix)
    return path


TARGET = Target("peft", (), write, peft.read)
