"""Small random bases with real processors, and small real data, one kind for each task."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
import yaml

from veneer.data.builtin import model_path, table
from veneer.data.chat import CHATML

ROOT = Path(__file__).parent.parent
# what `veneer train` reads; a file with a section `select` is for that verb
EXAMPLES = sorted(e for e in (ROOT / "examples").glob("*.yaml") if "select" not in yaml.safe_load(e.read_text(encoding="utf-8")))
# what each example is run with here: (base, data), the rest is the example's own
RUNS = {
    "classify": ("bert", "tweets"),
    "multi_label": ("bert", "topics"),
    "regression": ("bert", "scores"),
    "tokens": ("bert", "words"),
    "language_model": ("llama", "plain"),
    "masked": ("bert", "plain"),
    "chat": ("llama", "conversations"),
    "dpo": ("llama", "preferences"),
    "text_to_text": ("t5", "pairs"),
    "images": ("vit", "pictures"),
    "sounds": ("wav2vec2", "sounds"),
    "embeddings": ("bert", "halves"),
    "choice": ("llama", "labelled"),
    "t_few": ("t5", "questions"),
}


def make_bases(root: Path) -> Path:
    """A folder for each base, as save_pretrained leaves it; the text models have a tokenizer of MiniLM's kind, trained on
    tweets, with so few words that the heads of language models are small."""
    tokenizer = tf.AutoTokenizer.from_pretrained(model_path("minilm")).train_new_from_iterator(table("tweets").texts[:3000], 1500, show_progress=False)
    size: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    plain = {k: v for k, v in size.items() if k != "vocab_size"}
    torch.manual_seed(0)
    models = {
        "bert": tf.BertForSequenceClassification(tf.BertConfig(**size, num_labels=3)),
        "llama": tf.LlamaForCausalLM(
            tf.LlamaConfig(**size, num_key_value_heads=2, pad_token_id=0, bos_token_id=101, eos_token_id=102, max_position_embeddings=256)
        ),
        "t5": tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=102,
                decoder_start_token_id=0,
            )
        ),
        "vit": tf.ViTForImageClassification(tf.ViTConfig(**plain, image_size=16, patch_size=8, num_labels=2)),
        "wav2vec2": tf.Wav2Vec2ForSequenceClassification(
            tf.Wav2Vec2Config(
                **size, conv_dim=(16, 16), conv_stride=(20, 16), conv_kernel=(40, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2, classifier_proj_size=16, mask_time_prob=0.0, num_labels=2,
            )
        ),
    }  # fmt: skip
    tokenizer.eos_token = "[SEP]"
    for name, model in models.items():
        model.save_pretrained(root / name)
        if name in ("bert", "llama", "t5"):
            tokenizer.chat_template = CHATML if name == "llama" else None
            tokenizer.save_pretrained(root / name)
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    tf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True).save_pretrained(root / "wav2vec2")
    return root


def make_data(root: Path, rows: int = 60) -> dict[str, str]:
    """Real tweets in the form of every task; real pictures of digits; sounds that are computed."""
    tweets = table("tweets").split(rows, 0, seed=0)[0]
    texts, labels = [t[:80] for t in tweets.texts], tweets.labels
    worth = {"negative": -1.0, "neutral": 0.0, "positive": 1.0}
    out = {"tweets": "tweets"}

    def jsonl(name: str, lines: list[dict[str, Any]]) -> None:
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        out[name] = str(path)

    def tag(word: str) -> str:
        return "B-NAME" if word.startswith(("@", "#")) else "B-NUM" if re.search(r"\d", word) else "O"

    def table_file(name: str, head: list[str], lines: Any) -> None:
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([head, *lines])
        out[name] = str(root / f"{name}.csv")

    question = [f"What does this say? {t}" for t in texts]
    jsonl("topics", [{"text": t, "label": [y] + (["long"] if len(t) > 60 else [])} for t, y in zip(texts, labels, strict=True)])
    table_file("scores", ["text", "label"], [(t, worth[y]) for t, y in zip(texts, labels, strict=True)] + [("no number", "much")])
    jsonl("words", [{"tokens": t.split(), "tags": [tag(w) for w in t.split()]} for t in texts])
    jsonl("plain", [{"text": t} for t in texts])
    jsonl("conversations", [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": y}]} for q, y in zip(question, labels, strict=True)])
    jsonl("preferences", [{"prompt": q, "chosen": f" {y}", "rejected": " no idea"} for q, y in zip(question, labels, strict=True)])
    table_file("labelled", ["text", "label"], zip(texts, labels, strict=True))
    table_file("pairs", ["source", "target"], zip(question, labels, strict=True))
    jsonl(
        "questions",
        [{"prompt": q, "choices": sorted(worth) + ["no idea"] * (i % 2), "label": y} for i, (q, y) in enumerate(zip(question, labels, strict=True))],
    )
    jsonl("halves", [{"anchor": t[: len(t) // 2].strip() or "a", "positive": t[len(t) // 2 :].strip() or "b"} for t in texts])
    _pictures(root / "pictures")
    _sounds(root / "sounds")
    return out | {name: str(root / name) for name in ("pictures", "sounds")}


def _pictures(root: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(60):
        (root / str(digits.target[i] % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(root / str(digits.target[i] % 3) / f"{i}.png")


def _sounds(root: Path) -> None:
    import soundfile

    rate, rng = 16000, np.random.default_rng(0)
    for i in range(24):
        kind = ("tone", "noise")[i % 2]
        time = np.arange(rate // 8 + 400 * i) / rate
        wave = np.sin(2 * np.pi * (200 + 20 * i) * time) if kind == "tone" else rng.standard_normal(len(time))
        (root / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(root / kind / f"{i}.wav", 0.3 * wave, rate)


def example(name: str, bases: Path, data: dict[str, str], output: Path, **changes: Any) -> dict[str, Any]:
    """The configuration in examples/ on a small base and small data, a few steps long."""
    settings = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    base, rows = RUNS[name]
    settings["data"] |= {"train": data[rows], "limit": 24, "eval_rows": 8}
    small = {"model": str(bases / base), "output": str(output), "max_steps": 3, "batch_size": 8, "max_length": 128, "gradient_accumulation": 1}
    return settings | small | changes
