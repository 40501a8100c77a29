"""A language learnt from plain text, and a task on top of it: MAD-X by configurations alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import veneer as vn
from bases import example
from veneer.data.chat import IGNORE
from veneer.serve.predict import Predictor
from veneer.train.config import make_config
from veneer.train.prepare import prepare
from veneer.train.run import read_run, run
from veneer.train.tasks.masked import MaskedLM


def test_a_task_over_a_language(small, tmp_path):
    language = run(make_config(example("masked", *small, tmp_path / "ny")), quiet=True)
    # the tied embedding is the checkpoint's own, and is not trained with the head that it lacks
    assert language.trainable < language.model.get_input_embeddings().weight.numel()
    own = vn.Bottleneck(reduction=2, activation="relu", at="ffn")
    assert language.metrics.keys() == {"loss"} and [t.method for t in vn.Plan.from_dict(read_run(tmp_path / "ny")["plan"]).terms()][0] == own
    settings = example("classify", *small, tmp_path / "task", adapters={"ny": str(tmp_path / "ny")})
    settings |= {"plan": {"stack": [{"use": "ny"}, {"method": "bottleneck", "size": 4}]}, "learning_rate": 1e-2, "choose_best": False}
    p = prepare(make_config(settings))
    assert list(p.model._veneer_state.adapters) == ["adapter"] and p.asked == vn.frozen(own) >> vn.Bottleneck(4)
    assert vn.summary(p.model).trainable == sum(x.numel() for x in p.model.parameters() if x.requires_grad)
    run(make_config(settings), quiet=True)
    # the language's numbers are held in the task's own file, which needs no other folder
    held, made = (vn.load(prepare(make_config(settings)).model, tmp_path / d / "adapter", "x", head=d == "task") for d in ("ny", "task"))
    of = [[t for q in a.parts if q.term == 0 for t in q.parameters()] for a in (held, made)]
    assert len(of[0]) > 4 and all(torch.equal(a, b) for a, b in zip(*of, strict=True))
    (tmp_path / "ny").rename(tmp_path / "gone")
    assert Predictor(tmp_path / "task")(["what a day"])[0]["label"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"plan": {"use": "ny"}}, vn.ConfigError, "none is given"),
        ({"plan": {"use": "nx"}, "adapters": {"ny": "LANGUAGE"}}, vn.AdapterError, "no adapter called 'nx'"),
        ({"plan": "lora", "adapters": {"ny": "LANGUAGE"}}, vn.ConfigError, "the plan uses none of them"),
        ({"plan": {"use": "ny"}, "adapters": {"ny": "nowhere"}}, vn.ConfigError, "not a run"),
        ({"plan": {"use": 3}}, vn.PlanError, "the name of an adapter"),
    ],
)
def test_what_cannot_be_used(small, tmp_path, changes, error, says):
    if changes.get("adapters", {}).get("ny") == "LANGUAGE":
        run(make_config(example("masked", *small, tmp_path / "ny", max_steps=1)), quiet=True)
        changes = changes | {"adapters": {"ny": str(tmp_path / "ny")}}
    with pytest.raises(error, match=says):
        prepare(make_config(example("classify", *small, tmp_path / "task") | changes))


def test_words_are_hidden_as_said(small, tmp_path):
    task = MaskedLM(make_config(example("masked", *small, tmp_path / "a")))

    class Tools:
        mask_token_id = 1

        def __len__(self):
            return 50

    task.tools = Tools()
    ids = torch.arange(100, 200).repeat(400, 1)
    may = ids.masked_fill(ids % 10 == 0, IGNORE)
    shown, labels = task.hidden(ids, may, torch.Generator().manual_seed(0))
    chosen = labels != IGNORE
    assert not chosen[may == IGNORE].any() and torch.equal(labels[chosen], ids[chosen]) and torch.equal(shown[~chosen], ids[~chosen])
    share, masked, same = chosen[may != IGNORE].float().mean(), (shown[chosen] == 1).float().mean(), (shown == ids)[chosen].float().mean()
    assert abs(share - 0.15) < 0.01 and abs(masked - 0.8) < 0.02 and abs(same - 0.1) < 0.02
    short = torch.full((3, 4), IGNORE)
    short[:, 2] = 7
    assert (task.hidden(torch.full((3, 4), 7), short, None)[1] == short).all()  # one word: it is hidden each time


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "deberta-v2", "mpnet", "electra"])
@pytest.mark.parametrize("training", [True, False])
def test_only_hidden_words_are_asked_for(small, tmp_path, family, training):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "embedding_size": 16}
    model = tf.AutoModelForMaskedLM.from_config(tf.AutoConfig.for_model(family, **sizes, n_heads=2, n_layers=1, dim=16, hidden_dim=24)).train(training)
    task = MaskedLM(make_config(example("masked", *small, tmp_path / "a")))
    task.tools = type("Tools", (), {"mask_token_id": 1, "__len__": lambda self: 50})()
    ids = torch.arange(5, 45).reshape(4, 10)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids % 10 == 0, IGNORE), "attention_mask": torch.ones_like(ids)}
    shapes = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    torch.manual_seed(3)
    loss, out = task.loss(model, batch)
    torch.manual_seed(3)
    shown, labels = task.hidden(ids, batch["labels"], None if training else torch.Generator().manual_seed(int(ids.sum())))
    right = model(input_ids=shown, labels=labels, attention_mask=batch["attention_mask"])
    assert torch.allclose(loss, right.loss, atol=1e-6)
    assert out.logits.shape == ((labels != IGNORE).sum(), 60) and shapes[0] == (4, 10, 16), "the hook before this one is the test's"
    assert shapes[-1] == (4, 10, 16) and right.logits.shape == (4, 10, 60), "the head is as before"


def test_masks_are_filled(small, tmp_path):
    run(make_config(example("masked", *small, tmp_path / "ny")), quiet=True)
    predict = Predictor(tmp_path / "ny")
    answer = predict(["what a [MASK] day for [MASK]"])[0]
    assert len(answer["words"]) == 2 and "[MASK]" not in answer["text"] and answer["text"].startswith("what a ")
    with pytest.raises(vn.DataError, match=r"no \[MASK\] is in 'what a day'"):
        predict(["what a day"])
