"""Adapters that other libraries wrote: who reads which folder. Such a folder has a file adapter_config.json."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import read_json

CONFIG = "adapter_config.json"
# packages of this one, each with:
#   owns(config) -> bool               whether that configuration is of its library
#   load(model, folder, name, activate=…) -> Adapter
#   about(folder, config) -> (name, base, class): what the file calls the adapter ('' nothing), the path of its base ('' none),
#                                      and transformers' class for it ('' what the base itself names)
READERS = (".adapterhub_format", ".peft_format")


def find(path: Path, name: str | None) -> Path | None:
    """The folder at or under `path` that holds an adapter: the one at the root, else one by its name."""
    if (path / CONFIG).exists():
        return path
    if name is not None and (path / name / CONFIG).exists():
        return path / name
    below = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if len(below) > 1:
        raise StoreError(f"there are {len(below)} adapters here", where=str(path), fix="Name one: " + ", ".join(repr(p.name) for p in below))
    return below[0] if below else None


def reader(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The module that reads `folder`, and the folder's configuration. Raises: StoreError for one of no known library."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise StoreError("not an adapter's configuration", where=str(folder / CONFIG))
    for module in (importlib.import_module(m, __package__) for m in READERS):
        if module.owns(config):
            return module, config
    raise StoreError("neither Hugging Face PEFT nor AdapterHub wrote this", where=str(folder / CONFIG), fix="It has no 'peft_type', and no 'config' either")
