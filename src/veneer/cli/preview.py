"""`veneer preview`: what a run would see and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..train.preview import Preview

NAME = "preview"
MOST = 12  # labels in a balance


def command(
    config: Annotated[str, typer.Argument(help="A YAML configuration; examples/ has some.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, as max_length=512 or data.limit=500.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows to show.", min=0)] = 3,
    measure: Annotated[bool, typer.Option(help="Try a step, for memory and time.")] = True,
) -> None:
    """Show decoded rows with the loss mask in colour, lengths, balance, what the plan attaches to, memory and time."""
    from rich.console import Console

    from ..train.config import load_config

    settings = load_config(config, overrides)
    from ..train.preview import preview

    show(preview(settings, rows=rows, measure=measure), Console())


def show(found: Preview, console: Any) -> None:
    """Print a `Preview`. Where there is no colour, what is learnt stands between ⟦ and ⟧."""
    from rich.panel import Panel
    from rich.text import Text

    p, config = found.prepared, found.prepared.config
    coloured = console.is_terminal and not console.no_color
    for i, segments in enumerate(found.samples, 1):
        text = Text(overflow="fold")
        for piece, learnt in segments:
            text.append(piece if coloured or not learnt else f"⟦{piece}⟧", style="bold green" if learnt else "dim")
        console.print(Panel(text, title=f"training row {i}: {'green' if coloured else '⟦…⟧'} is learnt", title_align="left"))

    def line(name: str, value: str) -> None:
        console.print(Text.assemble((f"{name:<12}", "bold"), value), soft_wrap=True)

    train, test = p.encoded
    line("data", f"{p.tables[0].format}: {len(train.rows):,} training and {len(test.rows):,} evaluation rows of {p.tables[0].source}")
    if p.task.cuts:
        least, median, most95, most = map(p.task.measured, found.lengths)
        line("lengths", f"{least} to {most}, median {median}, 95% up to {most95}; {found.cut} cut to {p.task.measured(found.longest)}")
    if found.packed:
        line("packing", f"{found.packed[0]:,} rows, {found.packed[1]:.0%} filled")
    if found.balance:
        total = sum(found.balance.values())
        shown = [f"{name} {count:,} ({count / total:.0%})" for name, count in list(found.balance.items())[:MOST]]
        line("labels", ", ".join(shown) + (f" and {len(found.balance) - MOST} more" if len(found.balance) > MOST else ""))
    console.print(str(found.summary), highlight=False, markup=False, soft_wrap=True)
    line("steps", f"{found.steps:,} of {config.batch_size} x {config.gradient_accumulation} rows")
    head = config.head_learning_rate
    line("rate", f"learning rate {found.rate[0]:g} ({found.rate[1]})" + (f", of the head {head:g}" if head else ""))
    if found.memory is not None:
        m, mib = found.memory, 1 << 20
        free = f"; free now: {m.free / mib:,.0f} MiB" if m.free is not None else ""
        parts = f"base {m.weights / mib:,.0f}, optimiser {m.optimiser / mib:,.1f}, {config.batch_size} longest rows {config.batch_size * m.row / mib:,.1f}"
        line("memory", f"about {m.total(config.batch_size) / mib:,.0f} MiB ({parts}){free}")
    if found.step_seconds is not None:
        line("time", f"about {_duration(found.step_seconds * found.steps)} ({found.step_seconds:.2f} s a step, measured here; evaluation comes on top)")
    for note in found.notes:
        console.print(Text.assemble(("note        ", "bold yellow"), note), soft_wrap=True)
    line("output", f"would write {config.output}")


def _duration(seconds: float) -> str:
    from ..report.run import duration

    return duration(seconds)
