"""What vn.settle makes of a raced adapter, for the evidence: which parts stay, and (on demand) the folded adapter's score."""

from __future__ import annotations

import time
from typing import Any

from tasks import batches, measures, predict_active

SHOWN, HALF = 256, 0.5  # training rows that gates are measured on; the share of the gated parameters that stays


def for_gates(train: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {k: v[:SHOWN] for k, v in train.items() if k != "labels"}
    return [{k: v[i : i + 64] for k, v in rows.items()} for i in range(0, len(rows["input_ids"]), 64)]


def likelihood(dev: dict[str, Any], wide: int, calibrated: bool) -> Any:
    """model -> log-likelihood of each dev row.

    calibrated  of the logits over the temperature at which the rows are likeliest, anew for each model. A trained model that says
                too much gains likelihood from losing any part, useful or not; this way that gain is the temperature's.
    """
    import torch

    own = list(batches(dev, wide))

    def score(model: Any) -> list[float]:
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in own]).double()
            labels = torch.cat([b["labels"] for b in own])
            warmth = torch.logspace(-1, 1, 81, dtype=torch.float64).tolist() if calibrated else [1.0]
            return min((torch.nn.functional.cross_entropy(logits / t, labels, reduction="none") for t in warmth), key=lambda x: float(x.mean())).neg().tolist()

    return score


def guided(args: Any, dev: dict[str, Any], guide: str) -> Any:
    return guide if guide == "outputs" else likelihood(dev, args.wide, guide == "calibrated")


def structure(args: Any, model: Any, name: str, train: dict[str, Any], dev: dict[str, Any], seed: int, guide: str, by: str) -> dict[str, Any]:
    """The plan of vn.settle(..., rewind=True) for the adapter `name`, which is taken off. It is left to the race to train it from the
    start that settle gives it, so `retune` does nothing here (tests/test_rewind.py: the two are the same)."""
    import veneer as vn

    begin = time.perf_counter()
    vn.activate(model, name)
    head = sum(p.numel() for part in vn.Adapter(model, name).parts if part.gate is None for p in part.parameters())
    found = vn.settle(model, for_gates(train), keep=HALF, by=by, name=name, score=guided(args, dev, guide), rewind=True, seed=seed, retune=lambda m: 0)
    vn.detach(model, name)
    about = {"parts": kept_of(found), "before": found.before, "head": head, "scored": found.scored}
    return {"plan": found.plan, **about, "ablation_seconds": round(time.perf_counter() - begin, 1)}


def copied(model: Any, name: str, new: str) -> None:
    """A second adapter with the plan and the values of `name`."""
    import tempfile

    import veneer as vn

    with tempfile.TemporaryDirectory() as folder:
        vn.save(model, folder, name=name)
        vn.load(model, folder, name=new)


def kept_of(found: Any) -> list[list[Any]]:
    """method, module, layers, numbers, mean gate, loss, kept: short, since each cell has some sixty."""
    return [[p["method"], p["module"], p["layers"], p["parameters"], round(p["mean"], 4), round(p["loss"], 6), int(p["kept"])] for p in found.parts]


def folded(
    args: Any, model: Any, name: str, train: dict[str, Any], dev: dict[str, Any], test: dict[str, Any], steps: int, seed: int, lr: float, classes: int
) -> dict[str, Any]:
    """The row without rewinding: gates folded into the trained numbers, and a re-tune of `steps` at a lower rate, whose checkpoint the
    dev rows choose."""
    import torch

    import veneer as vn

    scores: list[float] = []
    every, batch = max(1, steps // 4), 16

    def accuracy() -> float:
        return measures(predict_active(model, dev, args.wide), dev["labels"], classes)["accuracy"]

    def again(m: Any) -> None:
        generator = torch.Generator().manual_seed(seed + 7)
        optimizer = vn.adamw(m, lr=1.0, weight_decay=0.0)
        first = [g["lr"] for g in optimizer.param_groups]
        params = [p for g in optimizer.param_groups for p in g["params"]]
        scores.append(accuracy())
        kept = [p.detach().clone() for p in params]
        for step in range(steps):
            m.train()
            at = torch.randint(0, len(train["labels"]), (batch,), generator=generator).to(args.device)
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = args.again_rate * lr * rate * (1 - step / steps)
            m(**{key: v.index_select(0, at) for key, v in train.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % every == 0:
                scores.append(accuracy())
                if scores[-1] > max(scores[:-1]):
                    kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)
        m.eval()

    vn.activate(model, name)
    found = vn.settle(model, for_gates(train), keep=HALF, by=args.by, name=name, score=guided(args, dev, args.guide), retune=again)
    out = {**measures(predict_active(model, test, args.wide), test["labels"], classes), "dev": max(scores), "parameters": found.after, "again": found.steps}
    vn.detach(model, name)
    return out
