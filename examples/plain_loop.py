"""UniPELT in a plain torch loop, no trainer: real MiniLM, 300 real tweets. `python examples/plain_loop.py`"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import veneer as vn
from veneer.data.builtin import model_path, table

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
torch.manual_seed(0)
rows, _ = table("tweets").split(300, 0, seed=0)
names = rows.names
tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
model = AutoModelForSequenceClassification.from_pretrained(model_path("minilm"), num_labels=len(names))

plan = vn.gated(vn.Bottleneck(48) + vn.Prefix(10) + vn.LoRA(8)) + vn.Full(at="head")
adapter = vn.attach(model, plan, name="tweets")
print(vn.summary(model))


def batch(at: int, size: int = 16) -> dict[str, torch.Tensor]:
    pick = [(at * size + i) % len(rows) for i in range(size)]
    out = tokenizer([rows.texts[i] for i in pick], truncation=True, max_length=64, padding=True, return_tensors="pt")
    return {**out, "labels": torch.tensor([names.index(rows.labels[i]) for i in pick])}


optimiser = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
model.train()
for step in range(steps):
    loss = model(**batch(step)).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
print(vn.gates(model, [{k: v for k, v in batch(i).items() if k != "labels"} for i in range(4)]))
vn.save(model, "runs/plain-loop", name="tweets")
with vn.disabled(model), torch.no_grad():
    print(f"the base alone: loss {model(**batch(0)).loss.item():.3f}")
