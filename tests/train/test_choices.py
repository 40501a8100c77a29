"""Answers to choose among: a batch, padded on either side, scores what each candidate alone would."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from veneer.data.formats import BadRow
from veneer.data.tables import read_table
from veneer.train.config import make_config
from veneer.train.tasks import find_task

WORDS = "the film was good bad very so a story about dogs yes no maybe not".split()
ROWS = [
    {"prompt": "the film was", "choices": ["good", "very bad"], "label": "very bad"},
    {"prompt": "a story about dogs", "choices": ["yes", "no", "maybe not so"], "label": "0"},
]


def tokenizer(side):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[UNK]", "[END]", *WORDS]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", padding_side=side)


def model(name):
    torch.manual_seed(0)
    if name == "choice":
        config = tf.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0)
        return tf.LlamaForCausalLM(config).eval()
    config = tf.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("name", "side"), [("choice", "left"), ("choice", "right"), ("text-to-choice", "right")])
def test_scores_are_each_candidates_own(name, side):
    task = find_task(name)(make_config({"model": "x", "data": {"train": "x"}, "task": name}))
    task.tools, net = tokenizer(side), model(name)
    rows = task.encode(ROWS)
    with torch.no_grad():
        loss, out = task.loss(net, task.collator()([{k: v for k, v in r.items() if k != "length"} for r in rows]))
        alone = []
        for row in ROWS:
            for choice in row["choices"]:
                x, y = (torch.tensor([task.tools(t)["input_ids"]]) for t in (row["prompt"], choice))
                if name == "choice":
                    y = torch.cat([y, torch.tensor([[2]])], 1)  # it ends there
                    logp = net(torch.cat([x, y], 1)).logits[0, x.shape[1] - 1 : -1].log_softmax(-1)
                else:
                    logp = net(x, labels=y).logits[0].log_softmax(-1)
                alone.append(float(logp.gather(1, y[0, :, None]).mean()))
    assert out["logits"][0, 2] == float("-inf")
    found = torch.cat([out["logits"][0, :2], out["logits"][1]])
    torch.testing.assert_close(found, torch.tensor(alone), atol=1e-5, rtol=0)
    assert torch.isfinite(loss) and [r["labels"] for r in rows] == [1, 0]


def test_rows_that_are_no_choice(tmp_path):
    task = find_task("choice")(make_config({"model": "x", "data": {"train": "x"}, "task": "choice"}))
    task.tools = tokenizer("right")
    bad = [{**ROWS[0], "label": "fine"}, {**ROWS[0], "choices": ["good"], "label": "good"}]
    assert [type(r) for r in task.encode(bad)] == [BadRow, BadRow]
    assert "none of the choices" in task.encode(bad)[0].reason and "1 choices" in task.encode(bad)[1].reason
    (tmp_path / "a.csv").write_text("text,label\nso good,yes\nso bad,no\nbad,no\n")
    table = read_table(str(tmp_path / "a.csv"), formats=task.formats)
    task.labels = task.names(table)
    first = task.encode(table.rows)[0]
    assert len(first["targets"]) == 2 and first["labels"] == 1
