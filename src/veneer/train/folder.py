"""A run's folder: what is in it, whether it may be written, and what is said where it cannot."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, StoreError, VeneerError
from ..files import room, system_error
from ..store import write_whole
from .together import processes

# what a run has loaded of these has a part in its numbers
BESIDE = ("accelerate", "tokenizers", "datasets", "numpy", "trl")
RUN, CHECKPOINTS, ADAPTER, PROCESSOR = "run.json", "checkpoints", "adapter", "processor"


def check_folder(output: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError where `output` holds something else than an unfinished run of this configuration."""
    if output.exists() and not output.is_dir():
        raise ConfigError("a file is where the run's folder should be", where=str(output), fix="Choose another output=…")
    if not (output / RUN).exists():
        if output.exists() and any(output.iterdir()):
            raise ConfigError("the folder is not empty and holds no run", where=str(output), fix="Choose another output=…")
        return
    old = read_run(output)
    different = [k for k in described if old["config"].get(k) != described[k] and k != "resume"]
    if different:
        raise ConfigError(
            f"the folder holds a run of another configuration (other {', '.join(different)})",
            where=str(output),
            fix="Choose another output=…, or delete the folder",
        )
    if old.get("result") is not None:
        raise ConfigError("the run in this folder is finished", where=str(output), fix="Use it (veneer predict), choose another output=…, or delete the folder")


def write(output: Path, described: dict[str, Any], p: Any, result: dict[str, Any] | None, batch: dict[str, Any]) -> None:
    """Write run.json: the configuration, the plan, the labels, what the data gave, versions, how the batch is divided
    (and over how many processes), and the result (None until there is one)."""
    import transformers

    from .. import __version__

    others = {n: metadata.version(n) for n in BESIDE if n in sys.modules}
    data = {
        "config": described,
        "plan": p.plan.to_dict(),
        "labels": p.labels,
        "data": p.counts(),
        "batch": batch,
        "processes": processes(),
        "versions": {"veneer": __version__, "torch": torch.__version__, "transformers": transformers.__version__} | others,
        "result": result,
    }
    write_whole(output / RUN, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def read_run(output: Path) -> dict[str, Any]:
    """What `run.json` in the folder says. Raises: ConfigError where there is none."""
    try:
        data = json.loads((output / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            "this folder is not a run: it has no run.json", where=str(output), fix="Give the folder that `veneer train` or `veneer demo` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"run.json is damaged: {e}", where=str(output)) from None
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict) or not isinstance(data.get("labels"), list):
        raise ConfigError("run.json is not one of ours", where=str(output))
    return data


@contextlib.contextmanager
def full_disk(folder: Path, writing: bool = False) -> Iterator[None]:
    """What hinders writing becomes a StoreError that says what is kept. In a block that does nothing else (`writing`) any
    failure is that: torch's writer does not say what the system told it."""
    try:
        yield
    except VeneerError:
        raise
    except Exception as e:
        said = system_error(e)
        if not said and not writing:
            raise
        reason = said or (str(e).splitlines() or [type(e).__name__])[0]
        raise StoreError(
            f"the run cannot be written: {reason}",
            where=str(folder),
            fix=f"{room(folder)}. Make room; the last whole checkpoint is kept, and the same command goes on from it",
        ) from e
