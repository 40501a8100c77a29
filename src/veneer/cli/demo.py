"""`veneer demo`: the single methods and UniPELT on one task, side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "demo"
TRAIN, TEST = 500, 1000
# (name, plan as data, learning rate): the rates are for a few hundred steps; set by hand, not searched
PLANS: tuple[tuple[str, Any, float], ...] = (
    ("lora", {"method": "lora", "r": 8}, 5e-3),
    ("ia3", {"method": "ia3"}, 2e-2),
    ("bitfit", {"method": "bitfit"}, 5e-3),
    ("bottleneck", {"method": "bottleneck", "size": 48}, 3e-3),
    ("prefix", {"method": "prefix", "length": 10}, 2e-2),
    ("prompt", {"method": "prompt", "length": 10}, 2e-2),
    ("unipelt-apl", "unipelt-apl", 3e-3),
)


def command(
    model: Annotated[str, typer.Option(help="The base: 'minilm' (from its package), a folder, or a name of the hub.")] = "minilm",
    data: Annotated[str, typer.Option(help="Labelled text: 'tweets' (from its package), a file, or a dataset of the hub.")] = "tweets",
    text: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    label: Annotated[str | None, typer.Option(help="The column with the label.")] = None,
    out: Annotated[str, typer.Option(help="Where the runs are written.")] = "runs/demo",
    train: Annotated[int, typer.Option(help="Training examples.", min=2)] = TRAIN,
    test: Annotated[int, typer.Option(help="Test examples, never trained on.", min=2)] = TEST,
    epochs: Annotated[float, typer.Option(help="Passes over the training examples, the same for every method.", min=0.01)] = 2,
    seed: Annotated[int, typer.Option(help="Draws the examples, the heads and the batches.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data and say what would be trained; write nothing.")] = False,
) -> None:
    """Train every single method and UniPELT (bottleneck + prefix + LoRA under gates) on one task, and compare them.

    A run that was stopped goes on where it was; one that is finished is shown again.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with console.status("Loading the model and the data…"):
        from ..data.builtin import table
        from ..train.config import make_config
        from ..train.run import RUN, read_run, run

        rows = table(data, **({"text": text, "label": label} if data != "tweets" else {})).split(train, test, seed)
        rows = rows[0], rows[1].take(sorted(range(test), key=lambda i: len(rows[1].texts[i])))  # less padding
    if dry_run:
        balance = ", ".join(f"{name} {(rows[0].labels or []).count(name)}" for name in rows[0].names)
        console.print(f"{train} training rows of {data} ({balance}) and {test} for the test, on {model}, {epochs:g} epochs each:", markup=False)
        for name, plan, rate in PLANS:
            console.print(f"  {Path(out) / name}: {plan}, learning rate {rate:g}", markup=False, soft_wrap=True)
        return
    state: dict[str, dict[str, Any]] = {name: {} for name, _, _ in PLANS}
    begin = time.perf_counter()
    with Live(_table(state), console=console, refresh_per_second=4) as live:
        for name, plan, rate in PLANS:
            folder = Path(out) / name
            settings = make_config(
                {
                    "model": model, "plan": plan, "output": str(folder), "name": name, "seed": seed, "epochs": epochs, "learning_rate": rate,
                    "max_length": 64, "choose_best": False, "keep_checkpoints": 1, "eval_batch_size": 50,
                    "data": {"train": data, "text": text, "label": label, "limit": train, "eval_rows": test},
                }
            )  # fmt: skip
            if not ((folder / RUN).exists() and _same(read_run(folder), settings) and read_run(folder)["result"]):
                _train(run, settings, rows, state[name], lambda: live.update(_table(state)), name)
            result = read_run(folder)["result"]
            state[name] |= {"done": True, **result["metrics"], **{k: result[k] for k in ("trainable", "share", "seconds")}}
            live.update(_table(state))
    console.print(f"{train} training and {test} test examples of {data} on {model}, seed {seed}; {time.perf_counter() - begin:.0f} s in all.", markup=False)
    gated = Path(out) / PLANS[-1][0]
    report = json.loads((gated / "gates.json").read_text(encoding="utf-8"))
    from ..report.heat import terminal

    console.print(terminal(report["rows"]))
    console.print(f"The gates as a page:  {gated / 'gates.html'}", markup=False)
    console.print(f"The adapters:         {', '.join(str(Path(out) / name / 'adapter') for name, _, _ in PLANS)}", markup=False)
    console.print("Use one on a sentence of your own:", markup=False)
    console.print(f'  veneer predict {gated} "I would ride in a driverless car any day"', markup=False, soft_wrap=True)


def _same(old: dict[str, Any], settings: Any) -> bool:
    """Whether the folder's run is the one that is wanted; otherwise `run` says what differs."""
    new = settings.model_dump(mode="json")
    return all(old["config"].get(k) == v for k, v in new.items() if k not in ("plan", "resume"))


def _train(run: Any, settings: Any, rows: Any, row: dict[str, Any], show: Any, name: str) -> None:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            row.update(step=state.global_step, steps=state.max_steps)
            show()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                row["loss"] = logs["loss"]
            show()

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            row["testing"] = True
            show()

    result = run(settings, callbacks=[Progress()], quiet=True, rows=rows)
    if any(p.gate is not None for p in result.model.__dict__["_veneer_state"].adapters[name].parts):
        _measure_gates(result)


def _measure_gates(result: Any) -> None:
    """The gates on the test rows: gates.json and gates.html in the run's folder."""
    from ..gates import gates
    from ..report.heat import page
    from ..store import write_whole

    keys = ("input_ids", "attention_mask")
    data = result.evaluation
    chunks = ([{k: row[k] for k in keys} for row in (data[i] for i in range(at, min(at + 50, len(data))))] for at in range(0, len(data), 50))
    found = gates(result.model, (result.tokenizer.pad(c, return_tensors="pt") for c in chunks))
    write_whole(result.output / "gates.json", (json.dumps({"rows": found.rows}, indent=1) + "\n").encode())
    page(found.rows, result.output / "gates.html", f"{found.adapter}: mean gate by layer and method (± spread over examples)")


def _table(state: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for head, side in (
        ("method", "left"),
        ("progress", "left"),
        ("loss", "right"),
        ("accuracy", "right"),
        ("macro-F1", "right"),
        ("trainable", "right"),
        ("share", "right"),
        ("time", "right"),
    ):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    best = max((r["macro_f1"] for r in state.values() if "macro_f1" in r), default=None)
    for name, r in state.items():
        if r.get("done"):
            mark = "bold" if r["macro_f1"] == best else ""
            table.add_row(
                name,
                "done",
                f"{r['loss']:.3f}",
                f"{r['accuracy']:.3f}",
                f"{r['macro_f1']:.3f}",
                f"{r['trainable']:,}",
                f"{100 * r['share']:.2f}%",
                f"{r['seconds']:.0f} s",
                style=mark,
            )
        elif "step" in r:
            share = r["step"] / max(1, r["steps"])
            doing = "testing" if r.get("testing") else f"{'█' * int(10 * share):<10} {r['step']}/{r['steps']}"
            table.add_row(name, doing, f"{r['loss']:.3f}" if "loss" in r else "", "", "", "", "", "")
        else:
            table.add_row(name, "…", "", "", "", "", "", "")
    return table
