"""A run folded into its base: a plain checkpoint that from_pretrained loads, with no trace of this library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..attach import detach
from ..errors import CapabilityError, ConfigError, did_you_mean
from ..example import example
from ..files import whole_folder
from ..install import KEY
from ..merge import merge
from .measure import Difference, difference, output, with_and_without
from .opened import Opened, load_base, quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Plain:
    """A plain checkpoint: where it lies, its dtype, and how the output of what from_pretrained loads from there differs from
    that of the base with its adapters."""

    path: Path
    dtype: str
    difference: Difference


def write_merged(opened: Opened, to: str | Path, dtype: str | None = None) -> Plain:
    """Merge the active adapters into the base, write it in the folder `to` as a plain checkpoint with its tokenizer, load
    that with from_pretrained and compare the two. W' = W + dW is computed in fp32 and rounded once.

    dtype  'fp32', 'bf16' or 'fp16'; default: that of the base's own checkpoint

    `opened.model` is the merged model afterwards, without adapters. Raises: CapabilityError where a method or gate does not
    merge, or needs a bias that the base's class has not; MergeError (quantised or tied weights); ConfigError (an unknown
    dtype); StoreError (`to` is not empty, the disk is full).
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}", where="--dtype", fix=did_you_mean(dtype, DTYPES))
    kind = DTYPES[dtype] if dtype is not None else checkpoint_dtype(opened.base)
    inputs = example(opened.model)
    adapted, base = with_and_without(opened.model, inputs)
    fold(opened)
    with whole_folder(Path(to)) as folder, quiet():
        opened.model.to(kind).save_pretrained(folder)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(folder)
        again, _ = load_base(str(folder), type(opened.model).__name__)
        found = difference(adapted, output(again, inputs), base)
    return Plain(Path(to), str(kind).removeprefix("torch."), found)


def fold(opened: Opened) -> None:
    """Merge the active adapters of `opened` for good: its model is a plain one afterwards.

    Raises: CapabilityError, MergeError; the model is then as before.
    """
    model = opened.model
    merged = merge(model)
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items() if KEY not in k.split(".")}
    added = [type(module).__name__ for module, _ in merged.added]
    if added:
        from ..merge import unmerge

        unmerge(model)
        raise CapabilityError(
            f"merged, a {added[0]} would have a bias that its class has not, and from_pretrained would drop it",
            fix="Keep the adapter attached (veneer chat, veneer predict), or train without biases",
        )
    detach(model)
    model.load_state_dict(tensors)
    opened.names.clear()


def checkpoint_dtype(base: str) -> torch.dtype:
    """The dtype that the configuration at `base` names; fp32 where it names none."""
    import transformers

    from ..data.builtin import model_path

    found = transformers.AutoConfig.from_pretrained(model_path(base)).dtype
    return found if isinstance(found, torch.dtype) else torch.float32
