"""`veneer select`: the plan that a task needs, within a budget."""

from __future__ import annotations

from typing import Annotated, Any

import typer

NAME = "select"


def command(
    config: Annotated[str, typer.Argument(help="A YAML configuration as for `veneer train`, with a section `select`; examples/select.yaml is one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, as select.budget.minutes=30 or data.limit=500.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the space, what fits the budget and what it would cost; write nothing.")] = False,
) -> None:
    """Search for the plan that the task of CONFIG needs, within its budget: a Pareto front, and one recommended plan.

    The same command goes on where a stopped one was, with the same answer.
    """
    from rich.console import Console

    from ..select.config import load

    settings, section = load(config, overrides)
    console = Console()
    with console.status("Loading the model and the data…"):
        from ..select.prepare import arguments, bare, finish

        prepared, beside = bare(settings)
        options = arguments(settings, section, prepared, beside)
    data = prepared.train, prepared.evaluation
    from ..select.run import plan_search, select

    if dry_run:
        from ..select.outlook import outlook

        console.print(outlook(plan_search(prepared.model, data, **options)), highlight=False, markup=False, soft_wrap=True)
        return
    from ..select.table import closing, rich_table

    with Watch(console) as watch:
        found = select(prepared.model, data, **options, tell=watch)
    folder = finish(found, settings, section)
    console.print(rich_table(found))
    console.print(closing(found), markup=False, highlight=False)
    console.print(found.recommended, markup=False, soft_wrap=True)
    console.print(f"The reasons as a page:  {folder / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"veneer train {folder / 'plan.yaml'}", markup=False, soft_wrap=True)


class Watch:
    """A line that moves: which candidate is trained, the best so far, the time that is left."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[best]}"), console=console,
        )  # fmt: skip
        self.task = self.progress.add_task("asking for candidates", total=1.0, count="", left="", best="")

    def __enter__(self) -> Watch:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def __call__(self, now: Any) -> None:
        """Take a search.Progress."""
        trial = now.trial
        scored = [t for t in now.trials if t.status == "complete"] or [t for t in now.trials if "score" in t.objectives]
        best = max(scored, key=lambda t: t.score, default=None)
        left = now.left
        self.progress.update(
            self.task,
            completed=now.share,
            description=f"trial {trial.number} ({now.rung})",
            count=f"{len(now.trials)}{f'/{now.most}' if now.most else ''}",
            left="" if left is None else f"about {_time(left)} left",
            best="" if best is None else f"best {best.score:.4f}: {best.label[:60]}",
        )
        if now.event == "rung":
            score = f"{trial.score:.4f}" if "score" in trial.objectives else trial.why
            self.progress.console.print(
                f"trial {trial.number:>3}  {now.rung:>4}  {score}  {trial.objectives['parameters']:>11,.0f}  {trial.label}",
                markup=False, highlight=False, no_wrap=True, overflow="ellipsis",
            )  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
