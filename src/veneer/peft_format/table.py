"""The mechanism of the types in forms.py: tensors under each module, by name, and tensors kept once for all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, VeneerError
from ..methods.base import Method
from ..methods.part import module_at
from ..sites import Site
from .config import Draft, Source
from .places import pattern, short_names, sites_at

NATIVE = "Save it in the native format: vn.save(model, path)"
Tensors = dict[str, Tensor]


@dataclass
class Place:
    """One module of a file that is being read, with its tensors under our names."""

    source: Source
    path: str
    site: Site
    tensors: Tensors
    roots: Tensors
    patterns: dict[str, str]

    def of(self, key: str, default: Any) -> Any:
        """The value of a field at this module: its exceptions come first."""
        for name, value in self.source.table(self.patterns[key]).items() if key in self.patterns else ():
            if re.match(rf"(.*\.)?({self.source.regex(self.patterns[key], name).pattern})$", self.path):
                return value
        return self.source.config.get(key, default)

    def whole(self, key: str, default: int) -> int:
        return self.source.whole_of(key, self.of(key, default))

    def number(self, key: str, default: float) -> float:
        value = self.source.finite(key, self.of(key, default))
        return int(value) if value == int(value) else value

    def one_of(self, key: str, default: Any, options: dict[Any, Any]) -> Any:
        """What `options` says of the field's value."""
        value = self.of(key, default)
        if isinstance(value, (list, dict)) or value not in options:
            raise self.source.fail(f"{key}={value!r} cannot be read here", "Known: " + ", ".join(map(repr, options)))
        return options[value]

    @property
    def module(self) -> nn.Module:
        return module_at(self.source.model, self.path)


@dataclass(frozen=True)
class Made:
    """The parts of one of our methods at one site, which are being written: their tensors by our names."""

    model: nn.Module
    method: Any
    site: Site
    part: Any
    tensors: Tensors

    @property
    def module(self) -> nn.Module:
        return module_at(self.model, self.site.path)


def as_they_are(at: Any) -> Tensors:
    return at.tensors


@dataclass(frozen=True)
class Form:
    """One PEFT type as a table.

    make      what a file becomes
    names     what a tensor's key ends in -> our name of it
    roots     the same for tensors that stand once beside the modules' (a bank's here)
    options   the fields at a module -> our options
    fields    our options -> the fields
    patterns  fields that may differ from module to module -> the field that holds the exceptions
    reads     other fields that are known: they tell of training alone, or stand in `fixed`
    fixed     fields with the one value that we have
    enter, leave  the tensors of a module in our layout, and in theirs (both under our names)
    overall   fields that follow from all modules together
    also      other methods of ours that it can hold
    numbered  like roots, one tensor for each module, numbered in the model's order; or for each of the groups that
              `group` (the number of the module, the modules' paths, the file that is read) names
    hint      the option to save with, where a tensor is missing
    ready     what is done with a file once its tensors are sorted by module, before the first is read
    gather    what is done with all modules' tensors, in place, before the first is written
    reads_base whether tensors of the base go into what is stored
    """

    peft_type: str
    make: type[Method]
    names: dict[str, str]
    options: Callable[[Place], dict[str, Any]]
    fields: Callable[[Made], dict[str, Any]]
    patterns: dict[str, str] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    reads: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    enter: Callable[[Place], Tensors] = as_they_are
    leave: Callable[[Made], Tensors] = as_they_are
    overall: Callable[[list[Made]], dict[str, Any]] = lambda _: {}
    also: tuple[str, ...] = ()
    port: str = "weight"
    kinds: tuple[str, ...] = ("linear",)
    numbered: dict[str, str] = field(default_factory=dict)
    group: Callable[[int, list[str], Source | None], Any] = lambda i, *_: i
    hint: str = "save_projection=True"
    reads_base: bool = False
    ready: Callable[[Source, dict[str, Tensors]], None] = lambda *_: None
    gather: Callable[[list[Made]], None] = lambda _: None

    def known(self) -> set[str]:
        return {*self.reads.split(), *self.fixed, *self.patterns, *self.patterns.values(), "bias", "fan_in_fan_out"}

    def once(self) -> dict[str, str]:
        """The tensors that stand beside the modules', with the prefix of their keys."""
        return dict.fromkeys([*self.roots, *self.numbered], "base_model.")


def read(form: Form, source: Source) -> list[Draft]:
    """The plan of a file: one method for every set of options. Takes its tensors out of `source`."""
    for key, only in {"bias": "none", **form.fixed}.items():
        value = source.config.get(key, only)
        if value != only:
            raise source.fail(f"{form.peft_type} with {key}={value!r} cannot be read here", f"Only {only!r} has a counterpart: merge it with PEFT")
    found: dict[str, Tensors] = {}
    for key in list(source.tensors):
        end = next((e for e in form.names if key.endswith("." + e)), None)
        if end is not None:
            found.setdefault(key.removesuffix("." + end), {})[form.names[end]] = source.tensors.pop(key)
    missing = [k for k in form.roots if k not in source.tensors]
    if missing and found or form.roots and not found:
        raise source.fail(f"the tensor {[*missing, *form.names][0]!r} is not in the file", f"Save it with PEFT again, with {form.hint}")
    _numbered(form, source, found)
    form.ready(source, found)
    roots = {ours: source.tensors.pop(theirs) for theirs, ours in form.roots.items() if theirs in source.tensors}
    drafts: dict[tuple[Any, ...], dict[Site, Tensors]] = {}
    for path, tensors in found.items():
        sites = sites_at(source, path, form.port)
        if len(sites) > 1 or (form.port == "weight" and sites[0].kind not in form.kinds):
            what = "a whole fused projection" if len(sites) > 1 else f"a map of kind {sites[0].kind!r}"
            raise source.fail(f"{path!r} is {what}, which {form.make.name} cannot take from {form.peft_type}", "Merge it with PEFT")
        at = Place(source, path, sites[0], tensors, roots, form.patterns)
        if form.reads_base and any(t.is_meta for t in at.module.parameters(recurse=False)):
            raise source.fail(f"{form.peft_type} is read with the base's numbers, and {path!r} has none here", "Load on a base with its weights")
        try:
            options, values = form.options(at), form.enter(at)
        except VeneerError:
            raise
        except (KeyError, RuntimeError, IndexError, ValueError) as e:  # a tensor is missing, or of another shape
            shapes = {k: list(v.shape) for k, v in tensors.items()}
            raise source.fail(f"the tensors at {path!r} do not fit it: {shapes}", "The adapter is for another base, or the file is damaged") from e
        if values:
            drafts.setdefault(tuple(sorted(options.items())), {})[sites[0]] = values
    return [Draft(form.make(**dict(key), at=pattern(source.sites, list(v), source.where)), v, roots) for key, v in drafts.items()]


def _numbered(form: Form, source: Source, found: dict[str, Tensors]) -> None:
    order = _in_order(source.model, found)
    for theirs, ours in form.numbered.items():
        loose = {k: source.tensors.pop(k) for k in list(source.tensors) if k.startswith(theirs + ".")}
        for i, path in enumerate(order):
            key = f"{theirs}.{form.group(i, order, source)}"
            if key not in loose:
                left_out = source.config.get("save_projection") is False
                fix = f"Save it with PEFT again, with {form.hint}" if left_out else "The file is not whole; take another copy"
                raise source.fail(f"the tensor {key!r} is not in the file, which {path!r} needs", fix)
            found[path][ours] = loose[key]


def _in_order(model: nn.Module, paths: Any) -> list[str]:
    return [p for p, _ in model.named_modules() if p in paths]


def write(form: Form, model: nn.Module, parts: list[Any], methods: list[Any]) -> tuple[dict[str, Any], Tensors]:
    """The fields and tensors of a file for `parts`, which `methods`, their terms, made."""
    if form.reads_base and model.__dict__["_veneer_state"].merged is not None:
        raise CapabilityError(f"PEFT's {form.peft_type} stores numbers of the base, and adapters are merged into these", fix="vn.unmerge(model) first")
    made: dict[Site, Made] = {}
    banks = [p for p in parts if not p.acts]
    for p in parts:
        if not p.acts:
            continue
        s = p.site
        if s.port != form.port or s.slice is not None or (s.port == "weight" and s.kind not in form.kinds):
            what = "a slice of a fused projection" if s.slice is not None else f"a map of kind {s.kind!r}"
            raise CapabilityError(f"PEFT's {form.peft_type} cannot express {p.method_name} at {s.path!r}, {what}", fix=NATIVE)
        tensors = {k: v.detach() for k, v in p.state_dict().items()}
        before = made.get(s)
        if before is None:
            made[s] = Made(model, methods[p.term], s, p, tensors)
        elif before.part.term == p.term:
            before.tensors.update(tensors)
        else:
            raise CapabilityError(f"PEFT's {form.peft_type} has one adapter a module, and {s.path!r} has several", fix=NATIVE)
    if len(banks) > 1:
        raise CapabilityError(f"PEFT's {form.peft_type} shares {' and '.join(form.roots)} among all modules, and this adapter has several", fix=NATIVE)
    out: Tensors = {}
    paths = _in_order(model, {s.path for s in made})
    order = {path: i for i, path in enumerate(paths)}
    form.gather(list(made.values()))
    back = {ours: theirs for theirs, ours in form.names.items()}
    for s, one in made.items():
        left = form.leave(one)
        out |= {f"{s.path}.{back[k]}": v for k, v in left.items() if k in back}
        for theirs, ours in form.numbered.items():
            key = f"{theirs}.{form.group(order[s.path], paths, None)}"
            if not torch.equal(out.setdefault(key, left[ours]), left[ours]):
                raise CapabilityError(f"PEFT's {form.peft_type} has one {key} for all modules of its kind, and {s.path!r} has another", fix=NATIVE)
    if banks:
        wide, tall = max(s.inp for s in made), max(s.out for s in made)
        whole = Made(model, methods[banks[0].term], replace(banks[0].site, inp=wide, out=tall), banks[0], dict(banks[0].state_dict()))
        out |= {theirs: whole.tensors[ours].detach() for theirs, ours in form.roots.items()}
    fields = _fields(form, {s.path: form.fields(one) for s, one in made.items()})
    for key, only in form.fixed.items():
        if fields.get(key, only) != only:
            raise CapabilityError(f"PEFT's {form.peft_type} has nothing like this but with {key}={only!r}; here it is {fields[key]!r}", fix=NATIVE)
    if "transposed" in form.kinds:
        fields["fan_in_fan_out"] = any(s.kind == "transposed" for s in made)
    targets = short_names(model, [s.path for s in made])
    return {"bias": "none", "target_modules": targets, **form.fixed, **fields, **form.overall(list(made.values()))}, out


def _fields(form: Form, by_path: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The commonest value of every field, and the exceptions where there is a field for them."""
    out: dict[str, Any] = {}
    for key in next(iter(by_path.values())):
        values = {path: fields[key] for path, fields in by_path.items()}
        common = Counter(map(repr, values.values())).most_common(1)[0][0]
        out[key] = next(v for v in values.values() if repr(v) == common)
        odd = {path: v for path, v in values.items() if repr(v) != common}
        if odd and key not in form.patterns:
            path, value = next(iter(odd.items()))
            raise CapabilityError(f"PEFT's {form.peft_type} has one {key} for all modules; here it is {value!r} at {path!r} and {common} elsewhere", fix=NATIVE)
        if key in form.patterns:
            out[form.patterns[key]] = {_tail(form, path, by_path): v for path, v in odd.items()}
    return out


def _tail(form: Form, path: str, paths: Any) -> str:
    """A pattern for `path` alone, as all of PEFT's types understand it: they look for a dot before it."""
    tail = path.partition(".")[2]
    if not tail or any(p != path and p.endswith("." + tail) for p in paths):
        raise CapabilityError(f"PEFT's {form.peft_type} cannot name {path!r} alone", fix=NATIVE)
    return re.escape(tail)
