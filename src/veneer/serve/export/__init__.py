"""A run for other programs: one file a target, each opened again by its own reader and compared with what it came from."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import ConfigError, did_you_mean
from ...example import example
from ...files import whole_folder
from ..measure import Difference, difference, with_and_without
from ..opened import Opened

# the module of each; its TARGET is a Target
TARGETS = {"peft": ".peft", "vllm": ".vllm", "safetensors": ".tensors", "gguf": ".gguf", "onnx": ".onnx"}


@dataclass
class Exported:
    """What was written: where, what it is for, who read it again, and how that reader's output differs from ours."""

    path: Path
    target: str
    reader: str
    difference: Difference


@dataclass(frozen=True)
class Target:
    """How to write and how to read again: `write(opened, folder)` gives the file or folder that it made, and
    `read(opened, path, inputs)` the output that `reader`, a package, computes from it on the bare base.

    Both may use `opened.model` up: it is not needed afterwards.
    """

    reader: str
    needs: tuple[str, ...]
    write: Callable[[Opened, Path], Path]
    read: Callable[[Opened, Path, dict[str, Tensor]], Tensor]


def export(opened: Opened, to: str | Path, target: str) -> Exported:
    """Write the active adapter of `opened` in the new folder `to` for `target`, read it again and compare.

    peft         Hugging Face PEFT's files, read by peft
    vllm         the same, where they keep vLLM's rules: plain LoRA of one rank; read by peft
    safetensors  one file: the adapter's tensors, with its plan and base as metadata; read by safetensors
    gguf         a LoRA adapter for llama.cpp; read by the package gguf under llama.cpp's rules: W' = W + alpha / r · B A
    onnx         the whole model, the adapter merged where it merges and inside the graph where not; read by onnxruntime

    `opened` is used up. Raises: ConfigError (an unknown target, a package that is not installed), CapabilityError (what the
    target cannot express, and the way out), StoreError (`to` is not empty, the disk is full). Then nothing is written.
    """
    if target not in TARGETS:
        raise ConfigError(f"there is no target {target!r}", where="--to", fix=did_you_mean(target, TARGETS))
    t: Target = importlib.import_module(TARGETS[target], __name__).TARGET
    for package in (t.reader, *t.needs):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the package {package!r} is not installed", where=f"--to {target}", fix='pip install "veneer[export]"')
    inputs = example(opened.model)
    adapted, base = with_and_without(opened.model, inputs)
    with whole_folder(Path(to)) as folder:
        written = t.write(opened, folder)
        found = difference(adapted, t.read(opened, written, inputs), base)
        inside = written.relative_to(folder)
    return Exported(Path(to) / inside, target, f"{t.reader} {importlib.metadata.version(t.reader)}", found)


def one(opened: Opened) -> str:
    """The name of the one active adapter. Raises: ConfigError where several are."""
    names = opened.model.__dict__["_veneer_state"].active
    if len(names) != 1:
        raise ConfigError(f"{len(names)} adapters are active", fix="Export one at a time, or merge them")
    return names[0]
