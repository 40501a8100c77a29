"""`veneer inspect`: the sites of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

NAME = "inspect"


def command(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, a name of the hub, or 'minilm' (the demo's).")],
    plan: Annotated[str | None, typer.Option(help="A preset's name or a plan in YAML, to see what it would attach to.")] = None,
    at: Annotated[str | None, typer.Option(help="A pattern such as 'attn.{q,v}@:4': list what it matches.")] = None,
) -> None:
    """Show where methods may act in MODEL, from its configuration alone: no weights are loaded."""
    from rich.console import Console
    from rich.tree import Tree

    from ..attach import attach
    from ..resolve import sites
    from ..sites import PORTS
    from ..summary import summary

    console = Console()
    built = empty_model(model)
    found = sites(built)
    total = sum(p.numel() for p in built.parameters())
    root = Tree(f"{type(built).__name__}: {total:,} parameters")
    for port in PORTS:
        here = [s for s in found if s.port == port and (port != "param" or s.role)]
        if not here:
            from ..resolve import why_not

            root.add(f"{port}: none. {why_not(built, port)}")
            continue
        branch = root.add(f"{port} ({len(here)} sites)")
        groups: dict[tuple[str, str], list[Any]] = {}
        for s in here:
            groups.setdefault((s.tower, s.role or "(no role)"), []).append(s)
        for (tower, role), members in groups.items():
            layers = sorted({s.layer for s in members if s.layer is not None})
            where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}" if layers else members[0].path or "the model"
            size = f", {members[0].out} x {members[0].inp}" if port == "weight" else f", width {members[0].width}" if members[0].width else ""
            branch.add(f"{tower + '/' if tower else ''}{role}: {where}{size}", highlight=False)
    console.print(root)
    if at is not None:
        from ..patterns import select

        for port in PORTS:
            if any(s.port == port for s in found):
                try:
                    hits = select(found, at, port=port)
                except ValueError:
                    continue
                console.print(f"{at} on {port}: {', '.join(s.path for s in hits)}", markup=False)
    if plan is not None:
        import yaml

        attach(built, yaml.safe_load(plan), name="plan")
        console.print(str(summary(built)), highlight=False, markup=False, soft_wrap=True)


def empty_model(name: str) -> Any:
    """The model of that configuration on the meta device, with the head that its configuration names."""
    import torch
    import transformers

    from ..data.builtin import model_path
    from ..errors import ConfigError

    try:
        config = transformers.AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError) as e:
        raise ConfigError(f"no configuration: {str(e).splitlines()[0]}", where=name, fix="Give a folder with a config.json, or a name of the hub") from e
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return cls(config) if cls is not None else transformers.AutoModel.from_config(config)
