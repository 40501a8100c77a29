"""`veneer schema`: the configuration, described for editors and programs."""

from __future__ import annotations

import typer

NAME = "schema"


def command() -> None:
    """Print the JSON schema of a training configuration.

    Editors complete and check YAML with it: `veneer schema > veneer.schema.json`, then
    `# yaml-language-server: $schema=veneer.schema.json` as the first line of the configuration.
    """
    import json

    from ..train.config import TrainConfig

    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainConfig.model_json_schema()}, indent=2))
