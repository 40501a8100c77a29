"""Rows and frames: which rows of a batch use which adapters, and what else holds for one call of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterError, CapabilityError

if TYPE_CHECKING:
    from .methods.part import Part


class Routing:
    """Which rows of a batch use which adapters: `by_row` has the names of each."""

    def __init__(self, rows: Iterable[tuple[str, ...]]) -> None:
        self.by_row = tuple(rows)
        self.size = len(self.by_row)
        self.names = tuple(dict.fromkeys(n for row in self.by_row for n in row))
        self.number = -1  # how deep it is nested in others, while hosts have its recipes by this number
        self.recipes: dict[str, Any] = {}  # and by their paths
        self.slots: list[Any] = []  # the stacks of its adapters
        self.kind: Any = None  # groups.Kind
        self.fused = False  # whether vn.optimize joins maps and their parts
        self.kept: dict[Any, Any] = {}  # numbers on a device, and orders of slots: made once for all maps
        self._rows: dict[tuple[str, int, Any], Tensor | None] = {}
        self._of: dict[str, Routing] = {}
        self._runs: dict[frozenset[str], tuple[Run, ...] | None] = {}
        self._frames: dict[tuple[int, int, int], tuple[Frame, Frame]] = {}

    def of(self, name: str) -> Routing:
        """The routing of the rows that use `name`, when they are run by themselves."""
        if name not in self._of:
            self._of[name] = Routing(names for names in self.by_row if name in names)
        return self._of[name]

    def tensor(self, numbers: Iterable[int], device: Any) -> Tensor:
        """`numbers` on `device`."""
        key = (tuple(numbers), device)
        if key not in self.kept:
            self.kept[key] = torch.tensor(key[0], device=device)
        return self.kept[key]

    def sets(self, present: frozenset[str]) -> tuple[list[tuple[str, ...]], list[int] | None]:
        """The sets of adapters among `present` that rows use, and the number of each row's; None where the rows are in the order of
        the sets, as many for each, so that nothing has to be looked up."""
        if present not in self.kept:
            by_row = [tuple(n for n in row if n in present) for row in self.by_row]
            sets = list(dict.fromkeys(by_row))
            which = {names: e for e, names in enumerate(sets)}
            numbers, each = [which[row] for row in by_row], self.size // len(sets)
            self.kept[present] = sets, None if numbers == [e for e in range(len(sets)) for _ in range(each)] else numbers
        return self.kept[present]

    def order(self, rows: list[int], sets: list[tuple[str, ...]], n: int) -> Order:
        """`rows` of n for the sets with a name, one after another."""
        key = (tuple(rows), tuple(i for i, names in enumerate(sets) if names), len(sets), n)
        if key not in self.kept:
            self.kept[key] = Order(self, *key)
        return self.kept[key]

    def rows(self, name: str, n: int, device: Any) -> Tensor | None:
        """Row numbers of `name` in a tensor whose batch dimension has n entries (rows times beams, windows, tokens)."""
        key = (name, n, device)
        if key not in self._rows:
            if n % self.size:
                raise AdapterError(
                    f"the route names {self.size} rows and the batch has {n}",
                    fix="Give one adapter name (or None) for each row of the batch",
                )
            k = n // self.size
            mine = [i for i, names in enumerate(self.by_row) if name in names]
            if len(mine) == self.size:
                self._rows[key] = None
            else:
                self._rows[key] = torch.tensor([i * k + j for i in mine for j in range(k)], device=device, dtype=torch.long)
        return self._rows[key]

    def select(self, name: str, value: Tensor | None) -> Tensor | None:
        """The rows of `name` in a tensor whose first dimension is the batch; None stays None."""
        rows = None if value is None else self.rows(name, value.shape[0], value.device)
        return value if value is None or rows is None else value.index_select(0, rows)

    def runs(self, adapters: Iterable[str]) -> tuple[Run, ...] | None:
        """The batch as runs of neighbouring rows, each of which uses one set of `adapters`; None where an adapter's rows lie
        apart. Cutting a tensor in runs and joining them copies it once, however many adapters there are."""
        key = frozenset(adapters)
        if key not in self._runs:
            runs: list[Run] = []
            for i, names in enumerate(self.by_row):
                mine = frozenset(key.intersection(names))
                if runs and runs[-1].names == mine:
                    runs[-1] = runs[-1]._replace(stop=i + 1)
                else:
                    runs.append(Run(mine, i, i + 1))
            whole = all(sum(n in r.names for r in runs) == 1 for n in key.intersection(self.names))
            self._runs[key] = tuple(runs) if whole else None
        return self._runs[key]

    def frame(self, frame: Frame, run: Run) -> Frame:
        """What holds for the rows of `run` by themselves."""
        key = (id(frame), run.start, run.stop)
        if key not in self._frames or self._frames[key][0] is not frame:
            for old in [k for k, (f, _) in self._frames.items() if f is not frame]:
                del self._frames[old]
            count = run.stop - run.start

            def of_run(value: Tensor | None) -> Tensor | None:
                each = 0 if value is None else value.shape[0] // self.size
                return None if value is None else value.narrow(0, run.start * each, count * each)

            own = replace(
                frame, routing=Routing(self.by_row[run.start : run.stop]), mask=of_run(frame.mask), prompt=of_run(frame.prompt),
                batch=frame.batch * count // self.size,
            )  # fmt: skip
            self._frames[key] = (frame, own)
        return self._frames[key][1]


class Order(NamedTuple):
    """Which of n rows of a stack are at which places of one of `size` rows: rows[i] at places[i], and zeros elsewhere."""

    routing: Routing
    rows: tuple[int, ...]
    places: tuple[int, ...]
    size: int
    n: int

    @property
    def same(self) -> bool:
        return self.rows == self.places == tuple(range(self.n)) and self.size == self.n

    def forth(self, s: Tensor) -> Tensor:
        """(size, …) from (n, …)."""
        chosen = s.index_select(0, self.routing.tensor(self.rows, s.device))
        if len(self.rows) == self.size:
            return chosen
        return s.new_zeros(self.size, *s.shape[1:]).index_copy_(0, self.routing.tensor(self.places, s.device), chosen)

    def back(self, s: Tensor) -> Tensor:
        """(n, …) from (size, …)."""
        if len(self.rows) < self.n:
            return Order(self.routing, self.places, self.rows, self.n, self.size).forth(s)
        which = sorted(range(self.n), key=self.rows.__getitem__)
        return s.index_select(0, self.routing.tensor([self.places[i] for i in which], s.device))


class Run(NamedTuple):
    """Rows `start` to `stop` (not included), which use the adapters `names`."""

    names: frozenset[str]
    start: int
    stop: int


def cut(value: Any, runs: Iterable[Run], size: int, n: int, dim: int) -> list[Any]:
    """`value` in runs, if it is a tensor with n entries in `dim` (n / size for each of `size` rows); else as it is in each."""
    runs = list(runs)
    if not isinstance(value, Tensor) or value.dim() <= dim or value.shape[dim] != n:
        return [value] * len(runs)
    return list(value.split([(r.stop - r.start) * (n // size) for r in runs], dim))


@dataclass(frozen=True)
class Frame:
    """What holds for one call of the model: routing, the 2-D attention mask, batch size, whether there is a cache and
    how much is in it, sums kept with it, and how many real tokens of each row are its prompt (None: all)."""

    routing: Routing | None = None
    mask: Tensor | None = None
    batch: int = 0
    cached: bool = False
    past: int | Tensor = 0
    memo: dict[Any, Tensor] | None = None
    prompt: Tensor | None = None


def shared_by_rows(part: Part) -> CapabilityError:
    return CapabilityError(
        f"{part.method_name} at {part.site.path!r} acts on a state that all rows of the batch share, so rows cannot use different adapters there",
        fix="Leave that module out of the plan (at='…,!name:…'), or call the model once for each adapter",
    )


def with_own_caches(value: Any, frame: Frame) -> Any:
    """`value` with a cache of its own for each in it, to run a module a second time.

    Raises: CapabilityError where a cache is not empty: its state is one adapter's, and the others' is not known.
    """
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(with_own_caches(v, frame) for v in value)
    if isinstance(value, dict):
        return {k: with_own_caches(v, frame) for k, v in value.items()}
    if not hasattr(value, "get_seq_length"):
        return value
    if frame.past:
        raise CapabilityError(
            "a tensor that changes from row to row is read by a module with a recurrent state, which cannot be continued from a cache",
            fix="Generate with use_cache=False, or leave the mixers out of the plan",
        )
    own = copy.copy(value)
    if isinstance(getattr(own, "layers", None), list):
        own.layers = [_own(copy.copy(layer)) for layer in own.layers]
    return own


def _own(layer: Any) -> Any:
    """A cache's layer whose lists and dicts of states are its own."""
    vars(layer).update({k: copy.copy(v) for k, v in vars(layer).items() if isinstance(v, (dict, list))})
    return layer


def folds(n: int, frame: Frame) -> int:
    """How many entries of a batch dimension of size n belong to each example: tokens or windows that were folded in."""
    return n // frame.batch if frame.batch and n % frame.batch == 0 else 1


def gate_of(part: Part, x: Tensor, frame: Frame, mask: Tensor | None, batch_dim: int = 0, fold: int = 1) -> Tensor:
    """g of `part` for x: (), (n,) or (n, T), for the n entries of x's batch dimension.

    Where a model folds tokens or windows into the batch (`fold` of them for each example), the mean still runs over an
    example's own tokens.
    """
    gate = part.gate
    assert gate is not None
    if gate.per == "constant":
        return gate(None, frame)
    if batch_dim == 1:
        x = x.transpose(0, 1)
    n = x.shape[0]
    if fold > 1 and n % fold == 0:
        tail = 1
        for s in x.shape[1:-1]:
            tail *= s
        if mask is not None and mask.shape[0] != n // fold:
            mask = None
        g = gate(x.reshape(n // fold, fold * tail, x.shape[-1]), frame, mask, part)
        if g.dim() == 2:
            return g.reshape(n, tail)
        return g.repeat_interleave(fold, 0)
    if mask is not None and frame.cached and x.dim() == 3 and mask.shape[1] > x.shape[1]:
        mask = mask[:, -x.shape[1] :]
    return gate(x, frame, mask, part)


def widen_rows(value: Any, n: int, dim: int) -> Any:
    """`value` with n rows of every tensor that has one entry in `dim`."""
    if isinstance(value, Tensor):
        return value.expand(*value.shape[:dim], n, *value.shape[dim + 1 :]) if value.dim() > dim and value.shape[dim] == 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(widen_rows(v, n, dim) for v in value)
    return {k: widen_rows(v, n, dim) for k, v in value.items()} if isinstance(value, dict) else value


def select_rows(value: Any, n: int, dim: int, rows: Tensor) -> Any:
    """`value` with `rows` of every tensor that has n entries in `dim`."""
    if isinstance(value, Tensor):
        return value.index_select(dim, rows) if value.dim() > dim and value.shape[dim] == n else value
    if isinstance(value, tuple):
        return tuple(select_rows(v, n, dim, rows) for v in value)
    if isinstance(value, list):
        return [select_rows(v, n, dim, rows) for v in value]
    if isinstance(value, dict):
        return {k: select_rows(v, n, dim, rows) for k, v in value.items()}
    return value
