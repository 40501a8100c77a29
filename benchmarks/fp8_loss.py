"""The loss of a real run on an fp8 base beside the same run on its own base.

    python benchmarks/fp8_loss.py --model SmolLM2-135M-Instruct --data gsm8k/test.jsonl --steps 40

LoRA r=16 on all linears, AdamW, batches of GSM8K's questions with worked answers (loss on the answers), the same order and
the same starting numbers in every arm. Then the mean loss over rows that were not trained on. JSON lines go to --out. On a
CPU the fp8 arithmetic is emulated: values are rounded to e4m3 as on a GPU, and sums are fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def rows(tokenizer: Any, path: str, length: int) -> list[tuple[list[int], list[int]]]:
    out = []
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        head = tokenizer(f"Question: {d['question']}\nAnswer:").input_ids
        tail = tokenizer(f" {d['answer']}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        if len(head) + len(tail) <= length:
            out.append((head + tail, [-100] * len(head) + tail))
    return out


def batches(data: list[Any], size: int, device: str) -> list[dict[str, Any]]:
    import torch

    out = []
    for i in range(0, len(data) - size + 1, size):
        part = data[i : i + size]
        n = max(len(ids) for ids, _ in part)
        ids, labels, mask = (torch.full((size, n), v) for v in (0, -100, 0))
        for j, (a, b) in enumerate(part):
            ids[j, : len(a)], labels[j, : len(b)], mask[j, : len(a)] = torch.tensor(a), torch.tensor(b), 1
        out.append({"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)})
    return out


def run(a: argparse.Namespace, arm: str, data: list[Any], write: Any) -> None:
    import torch
    import transformers

    import veneer as vn

    dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype).to(a.device)
    torch.manual_seed(0)
    vn.attach(model, vn.LoRA(16, at="linear"))
    vn.optimize(model, base_compute="fp8" if arm == "fp8" else None)
    optimizer = vn.adamw(model, lr=a.lr)
    held, order = batches(data[: a.held], a.batch, a.device), batches(data[a.held :], a.batch, a.device)
    start = time.perf_counter()
    for i in range(a.steps):
        model.train()
        loss = model(**order[i % len(order)], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        write({"arm": arm, "step": i, "loss": round(loss.item(), 5), "seconds": round(time.perf_counter() - start, 1)})
        if i + 1 == a.steps or (i + 1) % a.every == 0:
            model.eval()
            with torch.no_grad():
                scores = [model(**b, use_cache=False).loss.item() for b in held]
            write({"arm": arm, "step": i, "held_out": round(sum(scores) / len(scores), 5)})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--device", default="cpu")
    p.add_argument("--arms", default="own,fp8")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--every", type=int, default=20)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--held", type=int, default=32)
    p.add_argument("--length", type=int, default=160)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--out", default="results/fp8_loss.jsonl")
    a = p.parse_args()
    import transformers

    data = rows(transformers.AutoTokenizer.from_pretrained(a.model), a.data, a.length)
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    with open(a.out, "a") as f:

        def write(record: dict[str, Any]) -> None:
            line = json.dumps(record)
            print(line, flush=True)
            f.write(line + "\n")
            f.flush()

        for arm in a.arms.split(","):
            run(a, arm, data, write)


if __name__ == "__main__":
    main()
