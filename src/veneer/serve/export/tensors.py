"""One safetensors file that says all of itself: tensors by name, and as metadata the plan and the base."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import Tensor

from ...adapter import Record
from ...attach import detach, join, make_parts
from ...fingerprint import compare
from ...plan import Plan
from ...store import fill, read_config, read_tensors, save
from ..measure import output
from ..opened import Opened
from . import Target, one

FILE, KEY = "adapter.safetensors", "veneer"


def write(opened: Opened, folder: Path) -> Path:
    """The native adapter's tensors in one file, with its description under the metadata key 'veneer' as JSON."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as aside:
        save(opened.model, aside, name=one(opened))
        config = read_config(Path(aside))
        tensors = read_tensors(Path(aside) / config["weights"], config["sha256"])
        described = {k: v for k, v in config.items() if k not in ("weights", "sha256", "tensors")}
        save_file(tensors, folder / FILE, metadata={"format": "pt", KEY: json.dumps(described)})
    return folder / FILE


def read(opened: Opened, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The output of the bare base with an adapter made from what the file says, and from nothing else."""
    from safetensors import safe_open

    detach(opened.model)
    with safe_open(path, framework="pt") as f:
        config = json.loads(f.metadata()[KEY])
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    plan = Plan.from_dict(config["plan"], where=str(path))
    record = Record("exported", plan, make_parts(opened.model, plan, blank=True))
    compare(config["base"], opened.model, str(path), {n for n in config["base"]["shapes"] if n not in dict(opened.model.named_parameters())})
    fill(opened.model, record, tensors, str(path))
    join(opened.model, record, True)
    return output(opened.model, inputs)


TARGET = Target("safetensors", (), write, read)
