"""The record of a search on disk: Optuna's journal, from which a killed search goes on to the same answer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError

NAME = "select"
LOG = "search.log"
EXTENDABLE = ("minutes", "trials")  # a larger budget goes on where a smaller one ended


def seed_of(*parts: Any) -> int:
    """A seed that is a function of `parts` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Record:
    """An Optuna study and its storage."""

    def __init__(self, study: Any, storage: Any) -> None:
        self.study, self.storage = study, storage
        self._study_id = storage.get_study_id_from_name(NAME)

    def all(self) -> list[Any]:
        """Every question that was asked, by number."""
        return self.study.get_trials(deepcopy=False)

    def accepted(self) -> list[Any]:
        """Those whose answer is a candidate to train."""
        return [t for t in self.all() if t.user_attrs.get("kind") == "accepted"]

    def note(self, number: int, key: str, value: Any) -> None:
        """Keep `value` with the trial, on the disk when this returns."""
        self.storage.set_trial_user_attr(self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number), key, value)


def record(folder: Path | None, settings: dict[str, Any]) -> Record:
    """The record of the search: kept in `folder`, or in memory where that is None.

    Raises: ConfigError where the folder holds a search with other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage: Any = optuna.storages.InMemoryStorage()
    if folder is not None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = folder / LOG
        if folder.exists() and not path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError("the folder is not empty and holds no search", where=str(folder), fix="Choose another folder (output=…)")
        folder.mkdir(parents=True, exist_ok=True)
        mend(path)
        storage = JournalStorage(JournalFileBackend(str(path)))
    found = optuna.create_study(storage=storage, study_name=NAME, directions=["maximize", "minimize"], load_if_exists=True)
    old = found.user_attrs.get("settings")
    if old is None:
        found.set_user_attr("settings", settings)
    else:
        other = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
        if other:
            raise ConfigError(
                f"the folder holds a search with other settings ({', '.join(other)})", where=str(folder), fix="Choose another folder, or delete this one"
            )
    return Record(found, storage)


def mend(path: Path) -> None:
    """Take off what a killed process left half written: the end of the last line, and its lock."""
    lock = path.with_name(path.name + ".lock")
    if lock.is_symlink() or lock.exists():
        lock.unlink(missing_ok=True)
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as f:
            f.truncate(whole)
            os.fsync(f.fileno())
