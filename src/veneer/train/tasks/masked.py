"""Masked language modelling: how an encoder learns a language or a domain from plain text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification

from ...data.chat import IGNORE
from ...data.formats import BadRow
from ...errors import ConfigError
from .base import Task


class MaskedLM(Task):
    """Cross-entropy of the tokens that are hidden (Devlin et al. 2019, 3.1): 15% of a text's tokens, at least one, of which
    80% become the mask, 10% a random token, and 10% stay. Training hides others each time; an evaluation always the same.

    A head that the checkpoint lacks is trained with the plan. What a later task takes from the run (`adapters:`) is without it.
    """

    name = "masked-lm"
    auto = "AutoModelForMaskedLM"
    formats = ("text",)
    fresh = True
    share = 0.15

    def ready(self) -> None:
        if self.tools.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask", where="model", fix="An encoder trained with one, as BERT's kin; task=causal-lm for decoders")

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        found, lengths = self.tokenize([r["text"] for r in rows], return_special_tokens_mask=True)
        return [
            {"input_ids": ids, "labels": [IGNORE if s else t for t, s in zip(ids, special, strict=True)], "length": n}
            if not all(special)
            else BadRow("there is nothing to hide: no token of it is a word")
            for ids, special, n in zip(found["input_ids"], found["special_tokens_mask"], lengths, strict=True)
        ]

    def collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tools, label_pad_token_id=IGNORE)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        # hidden here and not where rows are read: that is done ahead, and a run that goes on would hide others
        draw = None if model.training else torch.Generator(batch["labels"].device).manual_seed(int(batch["input_ids"].sum()))
        ids, labels = self.hidden(batch["input_ids"], batch["labels"], draw)
        asked = labels != IGNORE
        with only(model, asked):
            out = model(**{k: v for k, v in batch.items() if k != "labels"} | {"input_ids": ids})
        logits = out.logits if out.logits.dim() == 2 else out.logits[asked]
        return F.cross_entropy(logits.float(), labels[asked]), out

    def hidden(self, ids: Tensor, labels: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(ids with some hidden, labels: the true id where one is, IGNORE elsewhere), of ids and what may be hidden, all
        (rows, tokens)."""
        options: dict[str, Any] = {"generator": draw, "device": ids.device}
        lot, how = torch.rand(ids.shape, **options).masked_fill(labels == IGNORE, 2.0), torch.rand(ids.shape, **options)
        other = torch.randint(len(self.tools), ids.shape, **options)
        chosen = (lot < self.share) | (lot == lot.min(-1, keepdim=True).values)
        shown = torch.where(how < 0.8, torch.full_like(ids, self.tools.mask_token_id), torch.where(how < 0.9, other, ids))
        return torch.where(chosen, shown, ids), labels.masked_fill(~chosen, IGNORE)

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(self.tools.decode(row["input_ids"], skip_special_tokens=True), False)]


@contextmanager
def only(model: Any, asked: Tensor) -> Iterator[None]:
    """A model whose map to the vocabulary sees the positions in `asked` (rows, tokens) alone, and gives (positions, words): the
    logits of the others, 85% of a step's largest product, enter no loss. A model that computes that map by itself gives all.
    """
    owner = getattr(model, "module", model)
    head = owner.get_output_embeddings()

    def pick(module: nn.Module, args: Any) -> Any:
        (h, *rest) = args
        return (h[asked], *rest) if h.shape[:-1] == asked.shape else args

    hook = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
