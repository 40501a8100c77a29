"""Cartridges and context-aware prompts: against the text that they stand for, and against peft."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from test_low_rank import same

import veneer as vn
from helpers import build, fresh, refuses
from test_peft_format import shaken
from zoo import ZOO


# -- cartridges ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cartridge_of_a_text_is_the_text(kind: str) -> None:
    """Keys and values from the base itself: the same logits as with the text in front; and the sink stays."""
    model, inputs = build(kind), ZOO[kind].inputs(2, 6)
    text = torch.arange(10, 17)[None]
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=torch.cat([text.expand(2, -1), ids], 1)).logits[:, 7:]
    adapter = vn.attach(model, vn.Cartridge(7, sink=2, start="data"), batches=[{"input_ids": text}])
    same(model(input_ids=ids).logits, whole, 1e-4)
    again = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    with vn.disabled(model):
        plain = model.generate(torch.cat([text, ids[:1]], 1), max_new_tokens=4, do_sample=False)
    assert torch.equal(again[:, 6:], plain[:, 13:])
    width = sum(p.keys.shape[1] for p in adapter.parts if p.acts == "kv")
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 5 * width


def test_cartridges_that_cannot_be() -> None:
    model = build("llama")
    with refuses(vn.PlanError, "looks at data", "batches=", model=model):
        vn.attach(model, vn.Cartridge(7, start="data"))
    with refuses(vn.CapabilityError, "has 3 tokens, and 7 are needed", "longer text", model=model):
        vn.attach(model, vn.Cartridge(7, start="data"), batches=[{"input_ids": torch.arange(5, 8)[None]}])
    model, inputs = fresh("t5")
    with refuses(vn.PlanError, "neither rotary positions", model=model):
        vn.attach(model, vn.Cartridge(4))


# -- CPT -----------------------------------------------------------------------------------------------------------------
KINDS = [1, 2, 3, 4, 5, 6, 7, 8]


def test_cpt_is_pefts() -> None:
    """The same prompt, gradients and losses; PEFT's one mean is the two means here, by their numbers of labels."""
    ids, labels = [5, 9, 7, 6, 11, 12, 13, 8], torch.arange(20, 34).reshape(2, 7)
    config = peft.CPTConfig(
        cpt_token_ids=ids, cpt_tokens_type_mask=KINDS, opt_projection_epsilon=4.0, opt_projection_format_epsilon=2.0, opt_loss_decay_factor=0.7,
        opt_weighted_loss_type="decay", task_type="CAUSAL_LM",
    )  # fmt: skip
    other = shaken(build("llama"), config)
    model = build("llama")
    adapter = vn.attach(model, vn.CPT(tuple(ids), tuple(KINDS), bound=4.0, format=2.0, decay=0.7))
    (p,) = adapter.parts
    theirs = other.prompt_encoder["default"]
    free = p.free.long()
    assert free.tolist() == [0, 1, 2, 4, 5, 6]
    with torch.no_grad():
        theirs.delta_embedding.weight[[3, 7]] = 0  # labels, which only our test's shaking has moved
        p.delta.copy_(theirs.delta_embedding.weight[free])
    model.train(), other.train()
    given = {"input_ids": labels, "labels": labels}
    loss, own = other(**given).loss, model(**given).loss
    n, m = labels[:, 1:].numel(), 2
    total = (own * n + vn.penalty(model) * m * 2) / (n + 2 * m)
    # PEFT also counts the first token of every row, which the prompt predicts
    first = torch.nn.functional.cross_entropy(other(**{**given, "labels": None}).logits[:, len(ids) - 1].float(), labels[:, 0], reduction="sum")
    same((total * (n + 2 * m) + first) / (n + 2 * m + 2), loss)
    same(p.prompt(), theirs(torch.arange(8)))
    assert (p.within().norm(dim=1) <= p.most * 1.0001).all() and (p.delta.norm(dim=1) > p.most).any()
    model.zero_grad(), other.zero_grad()
    model(**given).logits.square().mean().backward()
    other(**{**given, "labels": None}).logits[:, len(ids) :].square().mean().backward()
    same(p.delta.grad, theirs.delta_embedding.weight.grad[free])
    vn.advance(model, 1, 2)
    same(p.delta, p.within())


def test_cpt_of_examples() -> None:
    def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 90 for c in text]}

    plan = vn.CPT.of([("ab", "y"), ("c", "z")], words, before="<", between=">", after="")
    assert plan.kinds == (1, 2, 2, 3, 4, 5, 6, 7, 8) and len(plan.ids) == 9
    model, inputs = fresh("llama")
    adapter = vn.attach(model, plan)
    with torch.no_grad():
        text = torch.tensor([plan.ids]).expand(len(inputs["input_ids"]), -1)
        same(model(input_ids=inputs["input_ids"]).logits, build("llama")(input_ids=torch.cat([text, inputs["input_ids"]], 1)).logits[:, 9:])
    assert adapter.num_parameters == 7 * 32
    with refuses(vn.PlanError, "is not causal", "context=0"):
        vn.attach(build("bert"), vn.CPT((5, 6)))
    with refuses(vn.PlanError, "there is no token 5000", "tokenizer"):
        vn.attach(build("llama"), vn.CPT((5, 5000)))


BAD = [
    (lambda: vn.Cartridge(3, sink=3), "leaves none to train", "length=4"),
    (lambda: vn.Cartridge(3, start="text"), "start is 'text'", ""),
    (lambda: vn.Cartridge(3, start="data", positions=False), "stands at the first positions", ""),
    (lambda: vn.CPT(), "ids are whole numbers", "vn.CPT.of"),
    (lambda: vn.CPT((3, 4), (1,)), "1 kinds for 2 ids", ""),
    (lambda: vn.CPT((3,), (4,)), "no token may move", ""),
    (lambda: vn.CPT((3,), bound=0), "must be positive", ""),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()
