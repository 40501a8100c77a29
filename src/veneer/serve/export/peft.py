"""Hugging Face PEFT's files, read again by peft."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...attach import detach
from ...store import save
from ..measure import output
from ..opened import Opened, quiet
from . import Target, one


def write(opened: Opened, folder: Path) -> Path:
    """adapter_config.json and adapter_model.safetensors. Raises: CapabilityError for what PEFT cannot express."""
    return save(opened.model, folder, name=one(opened), format="peft")


def read(opened: Opened, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The output of peft's own model on the bare base."""
    from peft import PeftModel

    detach(opened.model)
    with quiet():
        return output(PeftModel.from_pretrained(opened.model, str(path)), inputs)


TARGET = Target("peft", (), write, read)
