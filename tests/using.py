"""Small finished runs, trained once for all tests of use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from veneer.data.builtin import model_path
from veneer.train.config import make_config
from veneer.train.run import run

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT and a small Llama with MiniLM's real tokenizer, as save_pretrained leaves them; the Llama can chat."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**size, num_labels=3)).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, pad_token_id=0, bos_token_id=101, eos_token_id=102)).save_pretrained(root / "llama")
    words = tokenizer.backend_tokenizer
    words.post_processor = TemplateProcessing(single="$A", pair="$A $B")  # no [CLS], as decoders have it
    plain = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]")
    plain.chat_template = TEMPLATE
    plain.save_pretrained(root / "llama")
    return root


def _train(bases: Path, out: Path, base: str, plan: object, **changes: object) -> Path:
    (out.parent / "texts.jsonl").write_text("".join(json.dumps({"text": f"the number {i} is after {i - 1}"}) + "\n" for i in range(40)))
    own = {
        "bert": {"data": {"train": "tweets", "limit": 32, "eval_rows": 24}},
        "llama": {"task": "causal-lm", "data": {"train": str(out.parent / "texts.jsonl")}},
    }[base]
    config = {"model": str(bases / base), "plan": plan, "output": str(out), "max_steps": 6, "learning_rate": 2e-2, "batch_size": 8, "choose_best": False}
    run(make_config(config | own | changes), quiet=True)
    return out


@pytest.fixture(scope="session")
def runs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: 'lora' and 'ia3' on the Llama, 'gated' on the Llama with gates, 'bert' a classifier with LoRA."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "lora": _train(bases, root / "lora", "llama", {"method": "lora", "r": 4, "at": "linear"}),
        "ia3": _train(bases, root / "ia3", "llama", {"method": "ia3"}),
        "gated": _train(bases, root / "gated", "llama", {"gated": {"sum": [{"method": "lora", "r": 2}, {"method": "prefix", "length": 3}]}}),
        "bert": _train(bases, root / "bert", "bert", {"method": "lora", "r": 4}),
    }
