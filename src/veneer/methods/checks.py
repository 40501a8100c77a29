"""What methods ask of their options, with errors that name the method and the option."""

from __future__ import annotations

from typing import Any

from ..errors import PlanError, did_you_mean
from ..plan import finite, short, whole


class Checked:
    """The checks that a method's `__post_init__` makes; each raises PlanError."""

    at: str | None

    def _fail(self, what: str, fix: str = "") -> PlanError:
        return PlanError(f"{type(self).__name__}: {what}", fix=fix)

    def _positive(self, **values: Any) -> None:
        for key, value in values.items():
            if not whole(value):
                raise self._fail(f"{key} must be a whole number of at least 1, and of some use, not {short(value)}")

    def _count(self, **values: Any) -> None:
        for key, value in values.items():
            if not whole(value, 0):
                raise self._fail(f"{key} must be a whole number of at least 0, not {short(value)}")

    def _finite(self, **values: Any) -> None:
        for key, value in values.items():
            if not finite(value):
                raise self._fail(f"{key} must be a finite number, not {short(value)}")

    def _share(self, **values: Any) -> None:
        for key, value in values.items():
            if not finite(value) or not 0 <= value < 1:
                raise self._fail(f"{key} must be a number from 0 up to, not including, 1, not {short(value)}")

    def _bool(self, **values: Any) -> None:
        for key, value in values.items():
            if not isinstance(value, bool):
                raise self._fail(f"{key} must be True or False, not {short(value)}")

    def _one_of(self, options: Any, **values: Any) -> None:
        for key, value in values.items():
            if not isinstance(value, str) or value not in options:
                raise self._fail(f"{key} is {short(value)}", did_you_mean(str(value), map(str, options)))

    def _pattern(self) -> None:
        if self.at is not None and (not isinstance(self.at, str) or not self.at.strip()):
            raise self._fail(f"at must be a pattern such as 'attn.{{q,v}}', not {short(self.at)}")
