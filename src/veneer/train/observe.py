"""What a finished run leaves for its report: answers on the evaluation rows, gates, parameters, hardware."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calls import evaluating
from ..files import write_whole
from ..report.run import GATES, OBSERVED
from .progress import memory, size

MISTAKES, SAMPLES, LONGEST = 15, 4, 32
GATED_ROWS = 256  # of the evaluation rows; the spread of a mean over more is under a hundredth


def observe(folder: Path, trainer: Any, run: Any) -> None:
    """Write what the report shows beside run.json: evaluation.json with what the task has to say of the last evaluation
    (classes and mistakes, or samples), and gates.json where the plan has gates. Of several processes the first writes.

    run  with task, config.name
    """
    answers = run.task.answers(trainer, run) if trainer.written is None else {"samples": trainer.written.samples()}
    rows = gate_rows(trainer, run.config.name)
    if not trainer.is_world_process_zero():
        return
    _write(folder / OBSERVED, answers)
    if rows:
        _write(folder / GATES, {"rows": rows})


def _write(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(data, ensure_ascii=False) + "\n").encode())


class Seen:
    """A compute_metrics that remembers the last prediction, so that the report needs no second pass."""

    def __init__(self, compute: Callable[[Any], dict[str, float]]) -> None:
        self.compute, self.last = compute, None

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.last = prediction
        return self.compute(prediction)


def classes(prediction: Any, labels: list[str], texts: Callable[[int], str], pictures: Callable[[int], str | None] = lambda i: None) -> dict[str, Any]:
    """counts[truth][answer] over the classes `labels`, and the surest mistakes.

    prediction  logits (rows x classes) and label_ids (rows); texts: row -> its text; pictures: row -> a data URI
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    scores = torch.softmax(torch.as_tensor(np.asarray(logits)).float(), -1).numpy()
    truth, guess = np.asarray(prediction.label_ids), scores.argmax(-1)
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(counts, (truth, guess), 1)
    wrong = np.flatnonzero(truth != guess)
    wrong = wrong[np.argsort(-scores[wrong, guess[wrong]], kind="stable")][:MISTAKES]
    mistakes = [{"text": texts(int(i)), "truth": labels[truth[i]], "answer": labels[guess[i]], "probability": float(scores[i, guess[i]])} for i in wrong]
    for i, mistake in zip(wrong, mistakes, strict=True):
        if picture := pictures(int(i)):
            mistake["picture"] = picture
    return {"labels": labels, "counts": counts.tolist(), "mistakes": mistakes}


@torch.no_grad()
def samples(model: Any, tokenizer: Any, rows: Any) -> list[dict[str, str]]:
    """Greedy continuations of `SAMPLES` rows: after the part that is not trained on, else after the first half; of an
    encoder-decoder, the answers to its sources."""
    apart = bool(getattr(model.config, "is_encoder_decoder", False))
    begin, rest = [], []
    for i in range(min(SAMPLES, len(rows))):
        ids, labels = rows[i]["input_ids"], rows[i].get("labels")
        cut = next((at for at, y in enumerate(labels) if y != -100), 0) if labels is not None else 0
        cut = len(ids) if apart else cut or max(1, len(ids) // 2)
        begin.append({"input_ids": list(ids[:cut])})
        rest.append([y for y in labels or [] if y >= 0] if apart else list(ids[cut:]))
    batch = tokenizer.pad(begin, padding_side="left", return_tensors="pt").to(next(model.parameters()).device)
    with evaluating(model):
        out = model.generate(**batch, max_new_tokens=LONGEST, do_sample=False)
    width = 0 if apart else batch["input_ids"].shape[1]

    def read(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [{"prompt": read(b["input_ids"]), "answer": read(o[width:]), "truth": read(r[:LONGEST])} for b, o, r in zip(begin, out, rest, strict=True)]


def gate_rows(trainer: Any, name: str) -> list[dict[str, Any]]:
    """The rows of vn.gates for the adapter `name` on at most `GATED_ROWS` evaluation rows, evenly drawn; none where it has
    no gates."""
    from torch.utils.data import DataLoader, Subset

    from ..attach import state_of
    from ..gates import gates

    if all(p.gate is None for p in state_of(trainer.model).adapters[name].parts):
        return []
    rows = trainer.eval_dataset
    some = Subset(rows, range(0, len(rows), -(-len(rows) // GATED_ROWS)))
    batches = DataLoader(some, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)  # all, in every process
    return gates(trainer.model, (trainer.task.inputs(trainer._prepare_inputs(b)) for b in batches), name).rows


def hardware() -> dict[str, str]:
    """Where this process runs, in words."""
    import psutil

    out = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), "processor": _processor()}
    out |= {"cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()), "memory": size(psutil.virtual_memory().total)}
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        out |= {"GPU": ", ".join(f"{c.name} ({size(c.total_memory)})" for c in cards), "CUDA": str(torch.version.cuda)}
    return out | {"peak memory": size(memory())}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
