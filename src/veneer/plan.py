"""Plans: methods combined, as values. `a + b` side by side, `a >> b` stacked, `gated(a + b)` under learnt gates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import PlanError, did_you_mean

if TYPE_CHECKING:
    from .methods.base import Method
    from .methods.part import Part
    from .sites import Site


class Plan:
    """A combination of methods with their targets; an immutable value that says nothing of any model.

    Methods are plans themselves. `a + b` puts plans side by side: each sees the base's own states, and their
    deviations add. `a >> b` stacks them: where both act on the same state, b sees what a made of it. `vn.gated(a)`
    scales every deviation in `a` by a learnt gate. `to_dict`/`from_dict` are strict: an unknown key is a `PlanError`.
    Printed, a plan is the Python that makes it.
    """

    def __add__(self, other: Plan) -> Plan:
        check_plan(other, "+")
        return Sum((*_members(self, Sum), *_members(other, Sum)))

    def __rshift__(self, other: Plan) -> Plan:
        check_plan(other, ">>")
        return Stack((*_members(self, Stack), *_members(other, Stack)))

    def leaves(self) -> Iterator[Method]:
        """The methods in it, in order."""
        for p in self.inside():
            yield from p.leaves()

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        """The methods with the stage and the gate that each has; stages count from 0 and grow along `>>`."""
        yield Term(self, stage, gate)  # type: ignore[arg-type]

    def depth(self) -> int:
        """How many stages it has."""
        return max((p.depth() for p in self.inside()), default=1)

    def inside(self) -> tuple[Plan, ...]:
        """The plans that it is made of; none for a method."""
        return ()

    def rebuild(self, members: list[Plan]) -> Plan:
        """The same kind of plan over `members` in place of those inside."""
        return self

    def dissolve(self, members: list[Plan]) -> Plan:
        """What is left of it over `members` once gates are constants: gates are gone."""
        return self.rebuild(members)

    def unresolved(self) -> bool:
        """Whether there is a `vn.use` in it, which only a model can write out."""
        return any(p.unresolved() for p in self.inside())

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, numbers, strings), fit for JSON and YAML; `from_dict` reads it back."""
        raise NotImplementedError

    @staticmethod
    def from_dict(data: Any, where: str = "plan") -> Plan:
        """The plan that `data` describes.

        `data` is a preset's name, a list (side by side), or a mapping with one of the keys `method` (and that method's
        options), `sum`, `stack`, `mixture`, `fuse` (lists), `gated` or `frozen` (a plan), `use` (an adapter's name); beside
        each, the options of the function of that name.

        Raises: PlanError, for an unknown method, key or value, naming the nearest.
        """
        from .reading import parse

        return parse(data, where)


@dataclass(frozen=True)
class Term:
    """One method of a plan, the stage at which it acts, and what gates it (None: nothing).

    member  which member of a mixture or a fusion it belongs to;  held: it is saved with the adapter and not trained
    pace    its learning rate, as a multiple of the run's (vn.paced)
    """

    method: Method
    stage: int
    gate: Gate | None
    member: int = 0
    held: bool = False
    pace: float = 1.0

    @property
    def unscaled(self) -> bool:
        """Whether the gate takes the place of the method's own scale."""
        return self.gate is not None and self.gate.takes_scale and not self.held


class Gate(Plan):
    """A plan that gives each of its methods' parts a gate (vn.gated, vn.mixture, vn.fuse).

    per       'constant' where the gates do not vary with the input, and so can be merged
    gate      'published' or 'deviation', for a prefix
    settles   whether vn.settle may replace its gates by their means
    takes_scale  whether the gate takes the place of a method's own scale, as UniPELT's does of LoRA's alpha / r
    """

    per: str = "token"
    gate: str = "deviation"
    settles: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = False

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        for i, p in enumerate(self.inside()):
            for t in p.terms(stage, self):
                yield replace(t, member=i)

    def dissolve(self, members: list[Plan]) -> Plan:
        return functools.reduce(operator.add, members)

    def make(self, site: Site, part: Part, width: int, new: dict[str, Any], member: int, shared: dict[Any, Any]) -> Any:
        """The gate (compose.gate.Gate) of `part` at `site`, whose input has `width` channels. `shared` lives as long as
        the parts of one adapter are being made."""
        raise NotImplementedError

    def check(self, parts: list[Part]) -> None:
        """Raise PlanError unless the parts that it gates are as it needs them. Default: they are."""


@dataclass(frozen=True)
class Sum(Plan):
    """Plans side by side: their deviations add."""

    members: tuple[Plan, ...]

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        for m in self.members:
            yield from m.terms(stage, gate)

    def inside(self) -> tuple[Plan, ...]:
        return self.members

    def rebuild(self, members: list[Plan]) -> Plan:
        return functools.reduce(operator.add, members)

    def to_dict(self) -> dict[str, Any]:
        return {"sum": [m.to_dict() for m in self.members]}

    def __str__(self) -> str:
        return " + ".join(f"({m})" if isinstance(m, Stack) else str(m) for m in self.members)

    __repr__ = __str__


@dataclass(frozen=True)
class Stack(Plan):
    """Plans one after another: each sees the states as the ones before left them."""

    members: tuple[Plan, ...]

    def terms(self, stage: int = 0, gate: Gate | None = None) -> Iterator[Term]:
        for m in self.members:
            yield from m.terms(stage, gate)
            stage += m.depth()

    def depth(self) -> int:
        return sum(m.depth() for m in self.members)

    def inside(self) -> tuple[Plan, ...]:
        return self.members

    def rebuild(self, members: list[Plan]) -> Plan:
        return functools.reduce(operator.rshift, members)

    def to_dict(self) -> dict[str, Any]:
        return {"stack": [m.to_dict() for m in self.members]}

    def __str__(self) -> str:
        return " >> ".join(f"({m})" if isinstance(m, Sum) else str(m) for m in self.members)

    __repr__ = __str__


OPTIONS = ("per", "gate", "bias", "temperature", "rate", "drop")
PER = ("example", "token", "constant")
GATES = ("deviation", "published")


@dataclass(frozen=True)
class Gated(Gate):
    """A plan whose every deviation is scaled by a learnt gate; made by `vn.gated`."""

    takes_scale = True

    plan: Plan
    per: str = "example"
    gate: str = "deviation"
    bias: float = 0.0
    temperature: float = 1.0
    rate: float = 1.0
    drop: float = 0.0

    def inside(self) -> tuple[Plan, ...]:
        return (self.plan,)

    def rebuild(self, members: list[Plan]) -> Plan:
        return gated(members[0], **{k: getattr(self, k) for k in OPTIONS})

    def make(self, site: Site, part: Part, width: int, new: dict[str, Any], member: int, shared: dict[Any, Any]) -> Any:
        from .compose.gate import Gate as Scale

        per = "example" if part.acts == "embed" and self.per == "token" else self.per
        if part.acts == "kv" and per == "token" and self.gate == "published":
            raise PlanError("gate='published' scales a prefix's keys for a whole example", fix="Use per='example' or gate='deviation'")
        causal = site.causal and part.acts != "embed"
        made = Scale(width, per=per, bias=self.bias, temperature=self.temperature, causal=causal, new=new)
        made.rate, made.drop = self.rate, self.drop
        return made

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"gated": self.plan.to_dict()}
        for key in OPTIONS:
            if getattr(self, key) != getattr(type(self), key):
                out[key] = getattr(self, key)
        return out

    def __str__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.to_dict().items() if k != "gated")
        return f"gated({self.plan}{options})"

    __repr__ = __str__


def gated(
    plan: Plan, *, per: str = "example", gate: str = "deviation", bias: float = 0.0, temperature: float = 1.0, rate: float = 1.0, drop: float = 0.0
) -> Plan:  # fmt: skip
    """Scale every deviation of `plan` by a learnt gate (UniPELT; Mao et al., ACL 2022, arXiv 2110.07577).

        h' = h + g · δ(x, h),   g = mean over real tokens of sigmoid((w·x + b) / temperature)

    for each method, layer and module, with x (B, T, d) what the method itself reads, as in the paper's code (the input
    of the map or the attention; for a sequential bottleneck the state that leaves its block), w (d) from zero and b
    from `bias` (0, so g = 0.5 at the start). Padding does not count in the mean (in the paper's code it
    does). In a causal tower the mean runs over the tokens so far, so that no token sees a later one and a key/value
    cache changes nothing. Under a gate LoRA's alpha/r is 1, as in the paper.

    per     'example' (the paper): one scalar for each example. 'token': g_t = sigmoid(w·x_t + b).
            'constant': g = sigmoid(b), one learnt scalar, which can be merged.
    gate    what the gate of a prefix scales. 'deviation' (default): out = attn + g·(attn with prefix - attn), off at
            g = 0. 'published': the prefix's keys and values, as in the paper's code; there keys of zero still draw
            attention at g = 0.
    bias    where a gate starts: 0 (the paper) halves every deviation, 3 leaves 95% of it
    rate    the gates' learning rate as a multiple of the run's; the methods' own are vn.paced's
    drop    in training a part is left out of an example this often (g = 0, and else g / (1 - drop)), so that the others learn
            to do without it, and settling loses less: LayerDrop (Fan et al., ICLR 2020, arXiv 1909.11556) for parts

    Raises: PlanError, for an unknown `per` or `gate`, a temperature or a rate that is not positive, a `drop` that is not from
    0 up to 1, or gates within gates.
    """
    check_plan(plan, "gated")
    if per not in PER:
        raise PlanError(f"gated: per is {short(per)}", fix=did_you_mean(str(per), PER))
    if gate not in GATES:
        raise PlanError(f"gated: gate is {short(gate)}", fix=did_you_mean(str(gate), GATES))
    for key, value in (("bias", bias), ("temperature", temperature), ("rate", rate), ("drop", drop)):
        if not finite(value):
            raise PlanError(f"gated: {key} must be a finite number, not {short(value)}")
        if key in ("temperature", "rate") and value <= 0:
            raise PlanError(f"gated: {key} must be positive, not {value!r}")
    if not 0 <= drop < 1:
        raise PlanError(f"gated: drop must be from 0 up to, not including, 1, not {drop!r}")
    ungated(plan, "gated")
    return Gated(plan, per, gate, float(bias), float(temperature), float(rate), float(drop))


def ungated(plan: Plan, who: str) -> None:
    """Raise PlanError unless every method in `plan` can have a gate, and has none yet. What `vn.use` stands for is known,
    and so checked, when the plan is attached."""
    for term in () if plan.unresolved() else plan.terms():
        if term.gate is not None:
            raise PlanError(f"{who}: a gate within a gate", fix="Gate the whole plan once: vn.gated(a + b)")
        if not term.method.gateable:
            raise PlanError(
                f"{who}: {term.method.name} replaces tensors and has no deviation to scale",
                fix=f"Put it beside the gates: vn.{who}(...) + vn.{type(term.method).__name__}(...)",
            )


LARGEST = 1e30  # of a hyper-parameter: well within every dtype's range, far over any use


def finite(value: Any) -> bool:
    """Whether `value` is a number that can be computed with; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def whole(value: Any, least: int = 1, most: int = 1 << 40) -> bool:
    """Whether `value` is a whole number from `least` to `most`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def short(value: Any) -> str:
    """`value` for an error's text, which stays one line whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists within lists
        return f"a {type(value).__name__} without end"
    return text if len(text) <= 80 else text[:79] + "…"


def check_plan(value: Any, who: str, fix: str = "Make a method first, such as vn.LoRA(8)") -> None:
    """Raise PlanError unless `value` is a plan."""
    if not isinstance(value, Plan):
        raise PlanError(f"{who} takes plans, not {short(value)}", fix=fix)


def _members(plan: Plan, kind: type) -> tuple[Plan, ...]:
    return plan.members if isinstance(plan, kind) else (plan,)  # type: ignore[attr-defined]
