"""One adapter, in another file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..attach import detach
from ..errors import ConfigError, did_you_mean
from ..example import example
from ..files import whole_folder
from ..store import CONFIG, load, save
from .measure import Difference, difference, output, with_and_without
from .opened import adapter_in, open_folder

FORMATS = ("veneer", "peft")


@dataclass
class Converted:
    """What was written: its format, its folder (which PeftModel.from_pretrained takes, where it is PEFT's), and how its output differs from the source's."""

    format: str
    path: Path
    difference: Difference


def convert(source: str | Path, to: str | Path, *, model: str | None = None, format: str | None = None) -> Converted:
    """Write the adapter `source` in the folder `to` as `format` (default: native; PEFT's where it is native), load what was written
    and compare it with the source on the same base.

    Raises: ConfigError, StoreError (`to` is not empty, another base), CapabilityError (what PEFT cannot express).
    """
    place, _ = adapter_in(Path(source))
    if format is None:
        format = "peft" if (place / CONFIG).exists() else "veneer"
    if format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}", where="--format", fix=did_you_mean(format, FORMATS))
    opened = open_folder(source, model=model, plain=True)
    name = opened.names[0]
    inputs = example(opened.model)
    adapted, base = with_and_without(opened.model, inputs)
    with whole_folder(Path(to)) as folder:
        written = save(opened.model, folder, name=name, format=format)
        if written != folder:  # PEFT keeps the adapter called 'default' in the folder itself, and this one's holds no other
            for file in written.iterdir():
                file.rename(folder / file.name)
            written.rmdir()
        detach(opened.model)
        load(opened.model, folder, name="written")
        found = difference(adapted, output(opened.model, inputs), base)
    return Converted(format, Path(to), found)
