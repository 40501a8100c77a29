"""`veneer init`: a commented configuration, by a few questions or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

NAME = "init"
# the questions, in order: the key, what is asked, and what Enter means
QUESTIONS = (
    ("task", "Task", "text-classification"),
    ("model", "Base model: a folder, a name of the hub, or minilm", "minilm"),
    ("data", "Training data: a file, a folder, a dataset of the hub, or tweets", "tweets"),
    ("plan", "Plan: a preset's name, or YAML such as {method: lora, r: 16, at: linear}", "lora"),
    ("output", "Where the run is written", "runs/train"),
)


def command(
    path: Annotated[str, typer.Argument(help="The file to write.")] = "veneer.yaml",
    task: Annotated[str | None, typer.Option(help="What is learnt, as text-classification or causal-lm.")] = None,
    model: Annotated[str | None, typer.Option(help="The base.")] = None,
    data: Annotated[str | None, typer.Option(help="The training data.")] = None,
    plan: Annotated[str | None, typer.Option(help="A preset's name, or a plan in YAML.")] = None,
    output: Annotated[str | None, typer.Option(help="Where the run is written.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the default where no flag is given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite PATH.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration; write nothing.")] = False,
) -> None:
    """Write a configuration with a comment on every key. Flags answer the questions in advance."""
    from pathlib import Path

    from ..errors import ConfigError
    from ..files import write_whole

    if Path(path).exists() and not force and not dry_run:
        raise ConfigError("there is a file already", where=path, fix="Give another name, or --force")
    given = {"task": task, "model": model, "data": data, "plan": plan, "output": output}
    answers: dict[str, str] = {}
    for key, question, default in QUESTIONS:
        value = given[key]
        if value is None and not yes:
            value = typer.prompt(question, default=default, value_proc=lambda said, key=key: _told(answers | {key: said.strip()}, key))
        answers[key] = str(default if value is None else value).strip()
    text = written(answers)
    if dry_run:
        typer.echo(text, nl=False)
        return
    write_whole(Path(path), text.encode())
    typer.echo(f"{path}: veneer train {path} --dry-run shows what it would train")


def _told(answers: dict[str, str], key: str) -> str:
    """The answer, once it is one that the configuration takes; a question with another answer is asked again."""
    from ..errors import VeneerError

    try:
        written({k: default for k, _, default in QUESTIONS} | answers)
    except VeneerError as e:
        raise typer.BadParameter(str(e)) from None
    return answers[key]


def written(answers: dict[str, str]) -> str:
    """The configuration's text, checked as `veneer train` checks it. Raises: ConfigError, PlanError."""
    import yaml

    from ..plan import Plan
    from ..train.config import TrainConfig, make_config

    try:
        plan = yaml.safe_load(answers["plan"])
    except yaml.YAMLError as e:
        from ..errors import ConfigError

        raise ConfigError(f"{answers['plan']!r} is neither a preset nor YAML: {' '.join(str(e).split())}", where="plan", fix="For example lora") from None
    Plan.from_dict(plan, where="plan")
    values = {"task": answers["task"], "model": answers["model"], "data": {"train": answers["data"]}, "plan": plan, "output": answers["output"]}
    text = f"# A run of Veneer: `veneer train` reads it. Keys behind a # stand at their defaults.\n{_keys(TrainConfig, values)}"
    make_config(yaml.safe_load(text), "veneer init")
    return text


def _keys(cls: Any, values: dict[str, Any], indent: str = "") -> str:
    """A line for each key of a pydantic model: those in `values` live, the others as comments with their defaults."""
    import yaml

    lines: list[str] = []
    for name, field in cls.model_fields.items():
        about = f"  # {field.description}" if field.description else ""
        value = values.get(name)
        if isinstance(value, dict) and hasattr(field.annotation, "model_fields"):
            lines += [f"{indent}{name}:{about}", _keys(field.annotation, value, indent + "  ").rstrip("\n")]
            continue
        live = name in values
        shown = yaml.safe_dump(value if live else field.get_default(call_default_factory=True), default_flow_style=True, width=10_000, allow_unicode=True)
        shown = shown.removesuffix("...\n").strip()
        lines.append(f"{indent}{'' if live else '# '}{name}: {shown}{about}")
    return "\n".join(lines) + "\n"
