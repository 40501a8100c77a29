"""The whole model as an ONNX graph, run again by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CapabilityError, MergeError
from ...example import example
from ..merged import fold
from ..opened import Opened
from . import Target

FILE = "model.onnx"
AXES = {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens"), "decoder_input_ids": ("batch", "answer")}


class _Logits(nn.Module):
    """The model with its inputs in a fixed order and its logits (or last hidden state) alone."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.model(**dict(zip(self.names, inputs, strict=True)), **({"use_cache": False} if hasattr(self.model.config, "use_cache") else {}))
        return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def write(opened: Opened, folder: Path) -> Path:
    """Write model.onnx, with batch and length free. The adapter is merged where it merges, else it stays in the graph.

    Raises: CapabilityError where torch cannot export the model, with its reason.
    """
    with contextlib.suppress(CapabilityError, MergeError):
        fold(opened)
    inputs = example(opened.model, seed=1)
    names = list(inputs)
    free = tuple({i: torch.export.Dim.DYNAMIC for i, _ in enumerate(AXES.get(n, ("batch",)))} for n in names)
    path = folder / FILE
    wrapped = _Logits(opened.model, names).eval()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter tells of each pass
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped, tuple(inputs.values()), str(path), dynamo=True, input_names=names, output_names=["output"], dynamic_shapes=(free,), verbose=False
            )  # fmt: skip
    except Exception as e:  # the exporter has an exception for each of its stages
        said = " ".join(str(e).split())[:200]
        raise CapabilityError(f"torch cannot export {type(opened.model).__name__} to ONNX: {said}", fix="Merge it (veneer merge), or serve it here") from e
    finally:
        logging.disable(before)
    return path


def read(opened: Opened, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What onnxruntime computes, on other inputs than those that the graph was traced with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.cpu().numpy() for k, v in inputs.items()})[0])


TARGET = Target("onnxruntime", ("onnx", "onnxscript"), write, read)
