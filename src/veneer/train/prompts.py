"""Prompts compared: none, hand-written ones, the learnt soft prompt, its nearest tokens, and words found by search."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter import disabled
from ..attach import detach
from ..errors import ConfigError
from ..files import write_whole
from ..harden import Hardened, Search, slot_of
from ..methods import find
from ..plan import Plan
from ..store import load
from .config import TrainConfig
from .prepare import Prepared, prepare
from .run import ADAPTER, Batch, make_trainer, reported, run
from .tasks import find_task

SOFT, TABLE = "soft", "prompts.json"


@dataclass
class Compared:
    """One prompt: its kind, its text (None: it has none), the scores on the evaluation rows, and its run's folder, if any."""

    kind: str
    text: str | None
    metrics: dict[str, float]
    folder: str | None = None


def soft_prompt(config: TrainConfig) -> tuple[Plan, list[Any]]:
    """The plan, and its one soft prompt before the input. Raises: ConfigError where there is none, or several."""
    plan = Plan.from_dict(config.plan, where="plan")
    soft = [m for m in plan.leaves() if m.ports == ("embed",)]
    if len(soft) != 1:
        raise ConfigError(f"the plan has {len(soft)} soft prompts", where="plan", fix="Give one, as plan=prompt or plan=p-tuning")
    return plan, soft


def compare_prompts(
    config: TrainConfig, texts: Sequence[str] = (), *, rows: int = 64, steps: int = 10, tries: int = 32, candidates: int = 16, quiet: bool = True
) -> Iterator[Compared]:
    """Train the soft prompt of `config`'s plan, look for words in its place, and score all on the same rows, one by one.

    Every text is a prompt that stays fixed (vn.PromptTuning(init='text', fixed=True)); what else is in the plan, and a new
    head, is trained beside it in a run of its own, as beside the soft prompt. Where nothing else is to be trained, the base is
    scored as it is. The search is vn.harden's, from the nearest tokens and from each of `texts`, on `rows` training rows.

    Runs are folders in `config.output`, with the whole table in `prompts.json` at the end. Raises: ConfigError where the plan
    has no soft prompt before the input, or several; else what a run raises.
    """
    plan, soft = soft_prompt(config)
    output, done, rest = Path(config.output), [], without(plan.to_dict())
    trains = rest is not None or find_task(config.task).head

    def kept(c: Compared) -> Compared:
        done.append(c)
        return c

    def scored(kind: str, data: Any, text: str | None, folder: str) -> Compared:
        settings = config.model_copy(update={"plan": data, "output": str(output / folder)})
        if trains:
            return kept(Compared(kind, text, run(settings, quiet=quiet).metrics, str(output / folder)))
        return kept(Compared(kind, text, evaluated(prepare(settings), output / folder)))

    yield kept(Compared("soft", None, run(config.model_copy(update={"output": str(output / SOFT)}), quiet=quiet).metrics, str(output / SOFT)))
    p = trained(config, output / SOFT / ADAPTER)
    if not trains:
        with disabled(p.model):
            yield kept(Compared("none", None, evaluated(p, output / "none")))
    else:
        yield scored("none", rest or {"method": "full", "at": "head"}, None, "none")
    for i, text in enumerate(texts, 1):
        yield scored("written", written(plan.to_dict(), text), text, f"written-{i}")
    found = searched(p, texts, rows, steps, tries, candidates)
    yield scored("nearest", written(plan.to_dict(), found.nearest[0]), found.nearest[0], "nearest")
    yield scored("searched", written(plan.to_dict(), found.text), found.text, "searched")
    table = {"rows": [vars(c) for c in done], "search": {"soft": found.soft, "nearest": found.nearest[1], "searched": found.loss, "tried": found.tried}}
    write_whole(output / TABLE, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


def trained(config: TrainConfig, folder: Path) -> Prepared:
    """What the run whose adapter is in `folder` ended with, and its rows."""
    p = prepare(config)
    detach(p.model, config.name)
    load(p.model, folder, name=config.name)
    p.task.model = p.model
    return p


def evaluated(p: Prepared, folder: Path) -> dict[str, float]:
    """The scores on the evaluation rows, without training."""
    return reported(p, make_trainer(p, folder, Batch(1, 1, False), [], quiet=True).evaluate())


def searched(p: Prepared, texts: Sequence[str], rows: int, steps: int, tries: int, candidates: int) -> Hardened:
    order = random.Random(p.config.seed).sample(range(len(p.train)), min(rows, len(p.train)))
    size, collate = p.config.eval_batch_size, p.task.collator()
    batches = [dict(collate([p.train[i] for i in order[at : at + size]])) for at in range(0, len(order), size)]
    own = p.task.loss

    def loss_on(batch: dict[str, Any]) -> Any:
        return own(p.model, batch)[0] if own is not None else p.model(**batch).loss

    p.model.eval()
    search = Search(p.model, p.tokenizer, batches, slot_of(p.model, p.config.name), loss_on)
    return search.run([None, *texts], steps, tries, candidates)


def written(data: Any, text: str) -> Any:
    """A plan's data with the fixed prompt `text` where its soft prompt is."""
    if isinstance(data, list):
        return [written(d, text) for d in data]
    if not isinstance(data, dict):
        return data
    if "method" in data and find(data["method"]).ports == ("embed",):
        place = {k: data[k] for k in ("at", "before_cls") if k in data}
        return {"method": "prompt", "length": None, "init": "text", "text": text, "fixed": True, **place}
    return {k: written(v, text) for k, v in data.items()}


def without(data: Any) -> Any:
    """A plan's data without its soft prompt; None where nothing is left."""
    if "method" in data:
        return None if find(data["method"]).ports == ("embed",) else data
    for head in ("sum", "stack"):
        if head in data:
            left = [m for d in data[head] if (m := without(d)) is not None]
            return {head: left} if left else None
    inner = without(data["gated"])
    return None if inner is None else {**data, "gated": inner}
