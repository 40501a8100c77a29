"""Hard prompts: what is nearest, what the search finds against trying everything, and that it can be typed."""

from __future__ import annotations

import pytest
import torch

import veneer as vn
from helpers import refuses, unchanged
from zoo import VOCAB, ZOO


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, VOCAB))]
    own = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", pad_token="[PAD]")


def batches():
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, VOCAB, (2, 6), generator=g) for _ in range(2)]
    return [{"input_ids": i, "labels": i} for i in ids]


def mean_loss(model, data, ids):
    """Of the batches with the tokens `ids` typed before them."""
    total = 0.0
    for b in data:
        typed = torch.tensor(ids)[None].expand(2, -1)
        labels = torch.cat([torch.full_like(typed, -100), b["labels"]], 1)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([typed, b["input_ids"]], 1)).logits[:, len(ids) :]
            total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, len(ids) + 1 :].flatten()))
    return total / len(data)


def test_the_search_finds_the_best_exchange_and_measures_what_typing_gives(words):
    model, base = ZOO["llama"].build(), ZOO["llama"].build()
    adapter = vn.attach(model, vn.PromptTuning(2), name="p")
    table = base.get_input_embeddings().weight.detach()
    with torch.no_grad():
        adapter.parts[0].vectors.copy_(table[[7, 23]] * 3 + 0.01 * torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(0)))
    data = batches()[:1]
    with unchanged(model):
        found = vn.harden(model, words, data, steps=1, tries=2 * VOCAB, candidates=VOCAB)
    assert found.nearest[0] == "w7 w23"  # the direction counts, not the length
    assert found.nearest[1] == pytest.approx(mean_loss(base, data, [7, 23]), abs=1e-5)
    ordinary = range(2, VOCAB)
    everything = {(a, b): mean_loss(base, data, [a, b]) for a in ordinary for b in ordinary if (a == 7) != (b == 23)}
    assert tuple(found.ids) == min(everything, key=everything.get) and found.loss == pytest.approx(min(everything.values()), abs=1e-5)
    assert found.text == words.decode(found.ids) and len(found.steps) == 1
    assert "searched" in str(found) and found.text in str(found)

    longer = vn.harden(model, words, data, steps=4, tries=24, candidates=12, start="w50 w51 w52")
    assert len(longer.ids) == 3 and longer.loss < mean_loss(base, data, [50, 51, 52])
    assert longer.loss == pytest.approx(mean_loss(base, data, longer.ids), abs=1e-5)
    assert [s[1] for s in longer.steps] == sorted((s[1] for s in longer.steps), reverse=True)

    vn.attach(model, vn.PromptTuning(None, init="text", text=longer.text, fixed=True), name="typed", tokenizer=words)
    with torch.no_grad():
        again = sum(float(model(**b).loss) for b in data)
    assert again == pytest.approx(longer.loss, abs=1e-5)


def test_a_written_prompt_can_stay_as_it_is(words, tmp_path):
    model = ZOO["llama"].build()
    plan = vn.PromptTuning(None, init="text", text="w9 w8 w7", fixed=True) + vn.LoRA(2)
    adapter = vn.attach(model, plan, name="a", tokenizer=words)
    assert not any("prompt" in n for n, _ in adapter.named_parameters())
    (data, _) = batches()
    before = model(**data).logits
    vn.save(model, tmp_path / "a")
    fresh = ZOO["llama"].build()
    vn.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(**data).logits, before)


def test_harden_says_what_is_missing(words):
    model = ZOO["llama"].build()
    vn.attach(model, vn.LoRA(2), name="l")
    vn.attach(model, vn.PromptTuning(2), name="p", activate=False)
    data = batches()
    with refuses(vn.PlanError, "'l' has 0 soft prompts", model=model):
        vn.harden(model, words, data)
    with refuses(vn.AdapterError, "'p' is not active", model=model):
        vn.harden(model, words, data, name="p")
    vn.activate(model, "p")
    with refuses(vn.CapabilityError, "no batches", model=model):
        vn.harden(model, words, [])
    with refuses(vn.CapabilityError, "gives no loss", "labels", model=model):
        vn.harden(model, words, [{"input_ids": data[0]["input_ids"]}])
    with refuses(vn.PlanError, "steps must be", model=model):
        vn.harden(model, words, data, steps=0)
    with refuses(vn.PlanError, "has no tokens", model=model):
        vn.harden(model, words, data, start="  ")
    image = ZOO["wav2vec2"].build()
    vn.attach(image, vn.PromptTuning(2), name="v")
    with refuses(vn.CapabilityError, "no token embedding"):
        vn.harden(image, words, [ZOO["wav2vec2"].inputs(2)])
