"""Unsloth's side of the benchmark of training steps. It must be imported before transformers, which it changes, and takes its model
from a folder: the random base is written to one, with a small tokenizer, the first time."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(packages: str) -> Any:
    """Import Unsloth, from a folder of unpacked wheels where one is named, behind what is installed."""
    if packages:
        sys.path.append(packages)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / f"unsloth-{os.getpid()}"))
    import unsloth

    return unsloth


def written(model: Callable[[], Any], name: str) -> Path:
    """The folder of the base, made whole or not at all: several arms may start at once."""
    folder = Path(tempfile.gettempdir()) / f"unsloth-base-{name}"
    if not folder.exists():
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"])}
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        own = Path(tempfile.mkdtemp(dir=folder.parent))
        model().save_pretrained(own)
        tokenizer.save_pretrained(own)
        try:
            own.rename(folder)
        except OSError:  # another arm was quicker
            pass
    return folder


def unsloth(module: Any, folder: Path, arm: str, r: int, dropout: float, length: int) -> Any:
    """LoRA on all linears as Unsloth makes it; of `unsloth-low`, with its offloaded checkpointing."""
    import torch

    checkpointing: Any = "unsloth" if arm == "unsloth-low" else False
    model, _ = module.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=max(2048, length), dtype=torch.bfloat16, load_in_4bit=False, use_gradient_checkpointing=checkpointing
    )
    places = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = module.FastLanguageModel.get_peft_model(
        model, r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=places, use_gradient_checkpointing=checkpointing
    )
    model.train()
    return model
