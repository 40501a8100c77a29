"""Pages of the reference that are made, not written: Python, methods, command line, configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File

GROUPS = {
    "Attach and take off": ("attach", "detach", "Adapter", "summary"),
    "Plans": ("Plan", "gated", "fuse", "mixture", "preset", "methods"),
    "Choose what acts": ("activate", "active", "disabled", "route"),
    "Gates and selection": ("gates", "settle", "select"),
    "Merge": ("merge", "unmerge"),
    "Files": ("save", "load"),
    "Training": ("param_groups", "penalty", "advance"),
    "Sites": ("sites", "Site"),
    "Speed": ("optimize", "unoptimize", "adamw", "estimate"),
    "Errors": (),
}


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages."""
    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def _where(name: str) -> str:
    """The path of the public `name`, as mkdocstrings finds it."""
    import veneer as vn

    value = getattr(vn, name)
    return f"{value.__module__}.{value.__qualname__}"


def python() -> str:
    """Every public name that is not a method of fine-tuning, in groups; none can be missing."""
    import veneer as vn

    methods = {m.cls.__name__ for m in vn.methods()}
    errors = sorted(n for n in vn.__all__ if isinstance(getattr(vn, n), type) and issubclass(getattr(vn, n), vn.VeneerError))
    placed = {n for names in GROUPS.values() for n in names} | methods | set(errors)
    groups = GROUPS | {"Errors": tuple(errors), "More": tuple(sorted(set(vn.__all__) - placed))}
    out = ["# Python\n\n`import veneer as vn`; every name below is `vn.name`. The methods have [a page of their own](methods.md).\n"]
    for title, names in groups.items():
        here = [n for n in names if n in vn.__all__]
        if here:
            out.append(f"## {title}\n")
            out += [f"::: {_where(n)}\n" for n in here]
    return "\n".join(out)


def methods() -> str:
    """Every method of the registry, by family, with what it can do."""
    from veneer import methods as registry

    out = ["# Methods\n\nEach is a plan by itself, and adds to any other: `vn.LoRA(8) + vn.Prefix(10)`.\n"]
    out += ["| method | family | acts on | can | paper |", "|---|---|---|---|---|"]
    out += [f"| `vn.{m.cls.__name__}` | {m.family} | {', '.join(m.ports)} | {', '.join(m.capabilities)} | {m.paper or '-'} |" for m in registry()]
    families: dict[str, list[Any]] = {}
    for m in registry():
        families.setdefault(m.family, []).append(m)
    for family, members in families.items():
        out.append(f"\n## {family[:1].upper()}{family[1:]}\n")
        out += [f"::: {m.cls.__module__}.{m.cls.__qualname__}\n" for m in members]
    return "\n".join(out)


def command_line() -> str:
    """Every verb with its arguments and options, read from the program itself."""
    import typer

    from veneer.cli import GROUPS as groups
    from veneer.cli import app

    program = typer.main.get_command(app)
    out = ["# Command line\n\nA mistake is one line on the standard error and exit code 2; Ctrl-C is 130. `veneer VERB --help` shows the same.\n"]
    out.append("`veneer --install-completion` makes the shell complete verbs and options.\n")
    for group, verbs in groups.items():
        out.append(f"## {group}\n")
        for verb in verbs:
            command = program.commands[verb.NAME]
            out.append(f"### veneer {verb.NAME}\n")
            out.append(_clean(command.help) + "\n")
            rows = [row for p in command.params for row in _parameter(p)]
            out += ["| argument or option | what it is | default |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join(out)


def _parameter(p: Any) -> Iterator[str]:
    name = p.metavar or p.name.upper() if p.param_type_name == "argument" else ", ".join(p.opts)
    text = getattr(p, "help", None)
    if text:
        unsaid = p.default is None or p.default is False or p.default == "" or callable(p.default)
        yield f"| `{name}` | {_clean(text)} | {'needed' if p.required else '' if unsaid else f'`{p.default}`'} |"


def _clean(text: str) -> str:
    """Text for a table's cell: no bar ends it, and no brace is taken for attributes."""
    return (text or "").strip().replace("|", "\\|").replace("{", "&#123;")


def configuration() -> str:
    """Every key of a configuration, read from its schema."""
    from veneer.train.config import TrainConfig

    schema = TrainConfig.model_json_schema()
    out = [f"# Configuration\n\n{_clean(schema.get('description', ''))}\n\n`veneer schema` prints the JSON schema for editors and programs;"]
    out.append("`veneer init` writes a commented file. On the command line, keys are set with `key=value`, as `data.limit=500`.\n")
    out += _keys("", schema, schema.get("$defs", {}))
    return "\n".join(out)


def _keys(prefix: str, schema: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    rows, below = ["| key | value | default | what it is |", "|---|---|---|---|"], []
    for name, said in schema["properties"].items():
        inner = [s["$ref"].rpartition("/")[2] for s in (said, *said.get("anyOf", ()), *said.get("allOf", ())) if "$ref" in s]
        default = "needed" if name in schema.get("required", ()) else f"`{said['default']}`" if "default" in said and said["default"] is not None else ""
        rows.append(f"| `{prefix}{name}` | {_kind(said)} | {default} | {_clean(said.get('description', ''))} |")
        for ref in inner:
            if "properties" in defs[ref]:
                below += [f"\n## {prefix}{name}\n\n{_clean(defs[ref].get('description', ''))}\n", *_keys(f"{prefix}{name}.", defs[ref], defs)]
    return rows + below


def _kind(said: dict[str, Any]) -> str:
    if "enum" in said or "const" in said:
        return ", ".join(f"`{v}`" for v in said.get("enum", [said.get("const")]))
    if "anyOf" in said:
        return " or ".join(dict.fromkeys(_kind(s) for s in said["anyOf"] if s.get("type") != "null"))
    if said.get("type") == "array":
        return f"list of {_kind(said.get('items', {}))}"
    limits = [f"{sign} {said[k]}" for k, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")) if k in said]
    name = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "mapping"}.get(said.get("type", ""), "")
    return " ".join(x for x in (name or ("keys below" if "$ref" in said else "any"), ", ".join(limits)) if x)


PAGES = {"python": python, "methods": methods, "command-line": command_line, "configuration": configuration}
