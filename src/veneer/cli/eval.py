"""`veneer eval`: how good a run is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

NAME = "eval"


def command(
    run: Annotated[str, typer.Argument(help="A run's folder; with --tasks also an adapter's: native, Hugging Face PEFT's or AdapterHub's.")],
    data: Annotated[str | None, typer.Argument(help="Rows as in training; default: those that the run held back.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, as arc_easy,hellaswag; else the run's own metrics.")] = "",
    include: Annotated[str | None, typer.Option(help="A folder with the harness's YAML files of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task; default: all.", min=1)] = None,
    shots: Annotated[int | None, typer.Option(help="Examples in the prompt; default: what the task says.", min=0)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Measure the base without the adapter too.")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Of a run that answers in text: exact match, ROUGE-L and chrF of its answers.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="With --generate: the longest answer, in tokens.", min=1)] = 64,
    find: Annotated[str | None, typer.Option(help="With --generate: a regular expression; what it finds last in an answer is to be the row's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 8,
    model: Annotated[str | None, typer.Option(help="The base, where it lies elsewhere now.")] = None,
    out: Annotated[str | None, typer.Option(help="Write the scores to this JSON file too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Find the tasks, or read the rows, and say what would be measured.")] = False,
) -> None:
    """Measure RUN: the metrics of its own task, or tasks of lm-evaluation-harness; the base beside it with --base."""
    from rich.console import Console
    from rich.table import Table

    names = [t.strip() for t in tasks.split(",") if t.strip()]
    if names:
        from ..eval.harness import harness, tasks_of
        from ..serve.opened import open_folder

        opened = open_folder(run, model=model)
        if dry_run:
            tasks_of(opened, names, include)
            typer.echo(f"would measure {', '.join(names)}")
            return
        options: dict[str, Any] = {"include": include, "limit": limit, "shots": shots, "batch_size": batch_size, "chat": chat}

        def measure(off: bool) -> list[Any]:
            return harness(opened, names, base=off, **options)

    else:
        from ..eval.own import own, rows_for
        from ..serve.predict import Predictor

        predictor = Predictor(run, model=model)
        if dry_run:
            if generate:
                from ..eval.generated import to_write
                from ..train.written import MEASURES

                rows, found = to_write(predictor, data, limit, find)[0], [*MEASURES, *(["found"] if find else [])]
            else:
                rows, found = rows_for(predictor, data).rows, list(predictor.task.measures)
            typer.echo(f"would measure {', '.join(found)} on {len(rows)} rows")
            return

        def measure(off: bool) -> list[Any]:
            if generate:
                from ..eval.generated import generated

                def note(done: int, of: int) -> None:
                    typer.echo(f"{'base' if off else 'adapter'}: {done} of {of} answers written", err=True)

                return generated(predictor, data, base=off, limit=limit, batch_size=batch_size, most=max_new_tokens, find=find, note=note)
            return own(predictor, data, base=off)

    arms = {"adapter": False} | ({"base": True} if base else {})
    found = {arm: measure(off) for arm, off in arms.items()}
    table = Table()
    for head in ("task", "metric", "rows", *found):
        table.add_column(head, justify="left" if head in ("task", "metric") else "right")
    for scores in zip(*found.values(), strict=True):
        first = scores[0]
        table.add_row(first.task, first.metric, str(first.rows), *(f"{s.value:.4f}" + (f" ± {s.error:.4f}" if s.error else "") for s in scores))
    Console().print(table)
    if out is not None:
        import json
        from dataclasses import asdict
        from pathlib import Path

        from ..files import write_whole

        written = {"run": run, "scores": {arm: [asdict(s) for s in scores] for arm, scores in found.items()}}
        write_whole(Path(out), (json.dumps(written, indent=1, ensure_ascii=False) + "\n").encode())
