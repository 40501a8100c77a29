"""A run's folder, loaded for use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..store import load
from ..train.config import make_config
from ..train.run import ADAPTER, load_model, read_run


class Predictor:
    """The base and the adapter of a finished run; all it needs is read from the run's folder.

    Raises: ConfigError (not a run), StoreError (the adapter's files).
    """

    def __init__(self, folder: str | Path) -> None:
        data = read_run(Path(folder))
        self.config = make_config(data["config"], str(folder))
        self.labels: list[str] = data["labels"]
        self.model, self.tokenizer = load_model(self.config, self.labels)
        load(self.model, Path(folder) / ADAPTER, name=self.config.name)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, texts: list[str], max_new_tokens: int = 40) -> list[Any]:
        """For a classifier a list of (label, probability), most likely first, for each text; else its continuation."""
        if not texts or not all(t.strip() for t in texts):
            raise DataError("there is no text", fix='For example: veneer predict RUN "a sentence"')
        batch = self.tokenizer(texts, truncation=True, max_length=self.config.max_length, padding=True, return_tensors="pt", return_token_type_ids=False)
        if not self.labels:
            out = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            return self.tokenizer.batch_decode(out, skip_special_tokens=True)
        rows = torch.softmax(self.model(**batch).logits.float(), -1).tolist()
        return [sorted(zip(self.labels, row, strict=True), key=lambda e: -e[1]) for row in rows]
