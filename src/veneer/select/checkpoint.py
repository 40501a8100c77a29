"""A race on disk: `race.json` and the tensors that it names by their digest; a kill leaves the old pair or the new one."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, StoreError
from ..files import DAMAGED, digest, read_json, read_tensors, sweep, write_whole
from .lanes import Record

if TYPE_CHECKING:
    from .heats import Heats

FILE, FORMAT, VERSION = "race.json", "veneer-race", 1
OURS = re.compile(r"race-[0-9a-f]{12}\.safetensors")


def save(folder: Path, race: Heats, settings: dict[str, Any]) -> None:
    """Write where the race stands. Raises: StoreError; what was there before is then still whole."""
    from safetensors.torch import save as to_bytes

    tensors = {"random": torch.get_rng_state()}
    for device in {p.device for lane in race.lanes for p in lane.params if p.is_cuda}:
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    for i, lane in enumerate(race.lanes):
        tensors |= {f"{i}/{k}": v.contiguous().cpu() for k, v in lane.state().items()}
    data = to_bytes(tensors)
    sha = digest(data)
    weights = f"race-{sha[:12]}.safetensors"
    described = {
        "format": FORMAT, "version": VERSION, "settings": settings, "step": race.step, "seconds": race.seconds,
        "records": [asdict(lane.record) for lane in race.lanes], "since": [lane.since for lane in race.lanes],
        "weights": weights, "sha256": sha,
    }  # fmt: skip
    write_whole(folder / weights, data)
    write_whole(folder / FILE, (json.dumps(described) + "\n").encode())
    sweep(folder, {weights, FILE}, OURS)


def load(folder: Path, race: Heats, settings: dict[str, Any]) -> bool:
    """Go on from what `folder` holds, if it holds anything. Raises: ConfigError for another race, StoreError for damage."""
    if not (folder / FILE).exists():
        return False
    where = str(folder / FILE)
    data = read_json(folder / FILE)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise StoreError("not a race of this version", where=where, fix=DAMAGED)
    try:
        records, weights = [Record(**r) for r in data["records"]], str(data["weights"])
        step, seconds, since = int(data["step"]), float(data["seconds"]), [int(n) for n in data["since"]]
        own = json.loads(json.dumps([settings, [(x.name, x.record.plan, x.record.settings) for x in race.lanes]]))
        theirs = json.loads(json.dumps([data["settings"], [(r.name, r.plan, r.settings) for r in records]]))
    except (KeyError, TypeError, ValueError) as e:
        raise StoreError(f"not a whole race: {e}", where=where, fix=DAMAGED) from None
    if own != theirs:
        what = "settings" if own[0] != theirs[0] else "candidates"
        raise ConfigError(f"the folder holds a race with other {what}", where=str(folder), fix="Choose another checkpoint=…, or delete the folder")
    if not OURS.fullmatch(weights):
        raise StoreError("names no weights of a race", where=where, fix=DAMAGED)
    tensors = read_tensors(folder / weights, str(data["sha256"]))
    try:
        for i, (lane, record) in enumerate(zip(race.lanes, records, strict=True)):
            lane.load({k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{i}/")}, since[i])
            for f in fields(Record):
                setattr(lane.record, f.name, getattr(record, f.name))
    except (KeyError, RuntimeError, IndexError) as e:
        raise StoreError(f"its tensors do not fit the candidates: {e}", where=where, fix=DAMAGED) from None
    race.step, race.seconds = step, seconds
    torch.set_rng_state(tensors["random"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return True
