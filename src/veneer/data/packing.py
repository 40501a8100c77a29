"""Several sequences in one row, each as if it were alone.

A packed row has `position_ids` that start again at 0 with each sequence and no attention mask: transformers (and flash
attention's variable-length kernel) then lets no token see another sequence. The first token of a sequence is never a
label, since nothing before it predicts it. Whether a model keeps to this is measured, not assumed: `check_packing`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from .chat import IGNORE

Row = dict[str, list[int]]


def pack(rows: list[Row], longest: int) -> list[Row]:
    """`rows` (input_ids, labels) in as few rows of at most `longest` tokens as first-fit-decreasing finds (Johnson 1973:
    at most 11/9 of the fewest, + 1), each with `position_ids`. The order within equal lengths is the given one."""
    bins: list[tuple[int, list[int]]] = []  # (room left, members)
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])):
        need = len(rows[i]["input_ids"])
        at = next((j for j, (room, _) in enumerate(bins) if room >= need), None)
        if at is None:
            bins.append((longest - need, [i]))
        else:
            bins[at] = (bins[at][0] - need, [*bins[at][1], i])
    out = []
    for members in sorted(sorted(m) for _, m in bins):
        row: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for i in members:
            ids = rows[i]["input_ids"]
            row["input_ids"] += ids
            row["labels"] += [IGNORE, *rows[i]["labels"][1:]]
            row["position_ids"] += range(len(ids))
        out.append(row)
    return out


class PackedCollator:
    """Rows of one length: each padding token is a sequence of its own, whose label is ignored. Shapes (rows, longest)."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)
        fill = {"input_ids": self.pad, "labels": IGNORE, "position_ids": 0}
        return {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in rows]) for k, v in fill.items()}


def check_causal(model: Any) -> None:
    """Raise ConfigError where a token's logits depend on what follows it: an encoder that was loaded with a language model's
    head would read the answers that it is to learn. Measured on eleven tokens, with gradients on, since some quantised
    layers settle for good what they are called with first."""
    from ..adapter import disabled
    from ..calls import device_of, evaluating

    with evaluating(model), disabled(model), torch.enable_grad():
        ids = torch.arange(5, 16, device=device_of(model))[None] % model.config.get_text_config().vocab_size
        other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
        one, two = (model(input_ids=i).logits[:, :-1].detach().float() for i in (ids, other))
    gap = float((one - two).abs().max() / one.abs().max().clamp(min=1e-6))
    if gap > (1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"{type(model).__name__} sees the tokens that it is to predict: a token's logits change by {gap:.1%} with the next one",
            where="model",
            fix="Use a decoder; an encoder's own task is masked-lm",
        )


@torch.no_grad()
def check_packing(model: Any, plan: Any) -> None:
    """Raise ConfigError unless packed sequences stay apart: the plan's methods must act token by token, and two sequences
    in one row must give the base's logits for each alone."""
    for term in plan.terms():
        if "embed" in term.method.ports:
            raise ConfigError(f"{term.method.name} stands before the first sequence of a row only", where="packing", fix="packing=false, or another method")
        if term.gate is not None and term.gate.per == "example":
            raise ConfigError("a gate for each example would mix the sequences of a row", where="packing", fix="packing=false, or gates per: token")
    from ..adapter import disabled
    from ..calls import device_of, evaluating

    device = device_of(model)
    with evaluating(model), disabled(model):
        ids = torch.arange(5, 16, device=device)[None] % model.config.get_text_config().vocab_size
        place = torch.tensor([[*range(6), *range(5)]], device=device)
        try:
            packed = model(input_ids=ids, position_ids=place, use_cache=False).logits[:, 6:]
        except TypeError:
            raise ConfigError("this model takes no position_ids, so packed sequences would mix", where="packing", fix="packing=false") from None
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits
    gap = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if gap > (1e-4 if alone.dtype == torch.float32 else 5e-2):
        raise ConfigError(f"this model mixes packed sequences: its logits change by {gap:.1%}", where="packing", fix="packing=false")
