"""Every error that a user can cause: what is wrong, where, and the nearest fix.

Each class is a `VeneerError`, so one `except vn.VeneerError` catches what the library refuses, and each is also the
builtin error that plain Python would raise for the same mistake (`ValueError`, `KeyError`, …).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """A refusal: `what` is wrong, `where` it is, and a `fix` that is near.

    The message is one line, `what [where]. fix`. Raising one leaves the model and the files as they were.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{what} [{where}]" if where else what
        super().__init__(f"{text}. {fix}" if fix else text)

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0]) if self.args else ""


class PlanError(VeneerError, ValueError):
    """A plan that says something impossible: an unknown method or key, a negative rank, a gate that cannot be."""


class SiteError(VeneerError, ValueError):
    """A pattern that cannot be read or matches nothing, or a port that this model does not have."""


class AdapterError(VeneerError, KeyError):
    """A name that is not attached or is attached already, or adapters in a state that forbids what was asked."""


class CapabilityError(VeneerError, TypeError):
    """Asked of a method what it has not declared: merging, routing, a port, a file format."""


class MergeError(VeneerError, RuntimeError):
    """Weights that cannot be folded or unfolded: quantised, tied, not finite, merged already or not at all."""


class StoreError(VeneerError, ValueError):
    """A file that is not an adapter of ours, is damaged, or belongs to another base."""


class ConfigError(VeneerError, ValueError):
    """A configuration or command line that cannot be honoured; `where` names the file or the option."""


class DataError(VeneerError, ValueError):
    """Data that cannot be read or used; `where` names file and row."""


def nearest(word: str, options: Iterable[str], *, most: int = 3) -> list[str]:
    """The `options` spelt most like `word`, best first; at most `most` of them, perhaps none."""
    return difflib.get_close_matches(word, list(dict.fromkeys(options)), n=most, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A sentence that names the nearest options, or all of them where none is near."""
    options = list(dict.fromkeys(options))
    close = nearest(word, options)
    if close:
        return "Did you mean " + " or ".join(repr(o) for o in close) + "?"
    if not options:
        return "There are none here."
    shown = ", ".join(repr(o) for o in options[:20])
    return f"Known here: {shown}" + (", …" if len(options) > 20 else "")
