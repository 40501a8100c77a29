"""An adapter goes on the base that it was trained on, and on no other."""

from __future__ import annotations

from pathlib import Path

import torch

import veneer as vn
from helpers import build, look, refuses
from zoo import ZOO


def test_another_base(saved: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    wide = BertForSequenceClassification(BertConfig(**{**build().config.to_dict(), "intermediate_size": 56}))  # type: ignore[union-attr]
    with refuses(vn.StoreError, "another base", r"56", r"48", "BertForSequenceClassification", model=wide):
        vn.load(wide, saved)
    other = build()
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.query.weight.mul_(1.5)
    with refuses(vn.StoreError, "another base: the numbers of bert.encoder.layer.1.attention.self.query.weight differ", "check_base=False", model=other):
        vn.load(other, saved)
    vn.load(other, saved, check_base=False)
    with refuses((vn.StoreError, vn.SiteError), "bias|another base", model=(llama := build("llama"))):  # type: ignore[arg-type]
        vn.load(llama, saved)


def test_a_new_head_is_no_other_base(saved: Path) -> None:
    other = build()
    with torch.no_grad():
        other.classifier.weight.normal_()
    inputs = ZOO["bert"].inputs(3, 7)
    vn.load(other, saved)
    first = build()
    vn.load(first, saved)
    assert torch.equal(look(first, inputs), look(other, inputs))
