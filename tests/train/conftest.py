"""Small bases and small data, made once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from bases import make_bases, make_data
from veneer.data.builtin import model_path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(folder of bases, {kind of data: path})."""
    return make_bases(tmp_path_factory.mktemp("bases")), make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small BERT and a small Llama with MiniLM's real tokenizer, as save_pretrained leaves them."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    torch.manual_seed(0)
    size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    for name, model in (
        ("bert", BertForSequenceClassification(BertConfig(**size, num_labels=3))),
        ("llama", LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, pad_token_id=0, bos_token_id=101, eos_token_id=102))),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root
