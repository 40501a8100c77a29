"""Patterns: the small language that chooses among a model's sites."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from .errors import SiteError, nearest
from .sites import Site

LINEAR = ("linear", "transposed", "tensor", "experts")


@dataclass(frozen=True)
class Member:
    """One member of a pattern, parsed: which towers, roles or module names, and layers it takes."""

    text: str
    role: str = ""  # a role, a glob of roles, 'all' or 'linear'
    regex: str = ""  # of name:REGEX
    tower: str = ""
    layers: str = ""  # what stands after '@'
    exclude: bool = False


def select(sites: Iterable[Site], pattern: str, *, port: str, default: bool = False, why: str = "") -> list[Site]:
    """The sites of `port` that `pattern` names, in the model's order.

    A pattern is a comma list of members [!][tower/]role[@layers]:

        attn.q  ffn.*  attn.{q,v}      a role, a glob over roles, alternatives
        attn  ffn                      a block; on the weight and param ports its members (attn.q, attn.k, …)
        linear  all                    every linear map except the head and routers; every site of the port (but for 'layer')
        layer                          on the hidden port: a whole layer, its h the residual stream
        name:REGEX                     module paths: the whole path or a whole tail of it; takes the rest of the pattern
        @3  @8:  @:4  @-2:  @::2  @{0,5}   layers of the tower, counted from 0; negative ones from its end
        vision/attn.q                  only in that tower
        !member                        takes away what it matches

    default   the pattern is a method's own: members that match nothing are dropped, and only an empty result is an error
    why       why the model has no site of this port at all, for the error

    Raises: SiteError, for a pattern that cannot be read, a member that matches nothing, a port the model does not have.
    """
    members = parse(pattern)
    here = [s for s in sites if s.port == port]
    if not here:
        raise SiteError(f"{pattern!r} needs the {port} port, which this model does not have" + (f": {why}" if why else ""))
    chosen: set[int] = set()
    dropped: list[Member] = []
    if members[0].exclude:
        chosen.update(i for i, s in enumerate(here) if _role("all", s))
    for m in members:
        hits = _match(m, here)
        if not hits and default:
            dropped.append(m)
        elif not hits:
            raise _nothing(m, here, port)
        elif m.layers.startswith("{") and not default:
            for part in m.layers[1:-1].split(","):  # each layer of a list must be there, too
                one = replace(m, layers=part.strip())
                if not _match(one, here):
                    raise _nothing(one, here, port)
        chosen = chosen - hits if m.exclude else chosen | hits
    if not chosen:
        if dropped:
            raise _nothing(dropped[0], here, port, pattern if len(members) > 1 else "")
        raise SiteError(f"{pattern!r} excludes every site of the {port} port")
    return [here[i] for i in sorted(chosen)]


MOST, DEEPEST = 4096, 8  # members and braces within braces: a pattern may come from a file that means harm


def parse(pattern: str) -> tuple[Member, ...]:
    """The members of `pattern`. Raises: SiteError with the place where it cannot be read."""
    if not isinstance(pattern, str):
        raise SiteError(f"a pattern is a string, not {type(pattern).__name__}", fix="For example 'attn.{q,v}'")
    return _parse(pattern)


@lru_cache(maxsize=512)
def _parse(pattern: str) -> tuple[Member, ...]:
    members: list[Member] = []
    for text in _split(pattern, pattern):
        if not _NAME.match(text.strip().removeprefix("!")):
            _bound(text, pattern)
        for one in _expand(text, pattern):
            members.append(_member(one.strip(), pattern))
    return tuple(members)


def _bound(text: str, pattern: str) -> None:
    """Refuse, before they are made, more alternatives than a model could have roles."""
    depth, count, options = 0, 1, 1
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        options += c == ","
        if depth > DEEPEST:
            raise SiteError(f"braces are nested more than {DEEPEST} deep", where=_short(pattern), fix="Write the alternatives in one pair: 'attn.{q,k,v}'")
        if c == "}":
            count, options = count * options, 1
        if count > MOST:
            raise SiteError(f"over {MOST} alternatives", where=_short(pattern), fix="Use a glob, as 'attn.*'")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _split(text: str, pattern: str) -> list[str]:
    """At the commas outside braces; name: takes all that follows."""
    out, depth, start = [], 0, 0
    i = 0
    while i <= len(text):
        if depth == 0 and (i == start or text[start:i].strip() in ("", "!")) and _NAME.match(text, i):
            out.append(text[start:])
            return out
        c = text[i] if i < len(text) else ","
        if c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
            if depth < 0:
                raise SiteError(f"'}}' without '{{' in {_short(pattern)!r} at position {i}", fix="Braces come in pairs: 'attn.{q,v}'")
        elif c == "," and (depth == 0 or i == len(text)):
            if depth:
                raise SiteError(f"'{{' is never closed in {_short(pattern)!r}", fix="Braces come in pairs: 'attn.{q,v}'")
            if not text[start:i].strip():
                raise SiteError(f"empty member in {_short(pattern)!r}" if pattern.strip() else "empty pattern", fix="For example 'attn.{q,v}'")
            out.append(text[start:i])
            start = i + 1
        i += 1
    return out


_NAME = re.compile(r"(?:[\w*?{},]+/)?name:")


def _expand(text: str, pattern: str) -> list[str]:
    """Alternatives in braces, the innermost nested ones too. Those of a layer list stay: '@{0,5}' is one member."""
    if _NAME.match(text.strip().removeprefix("!")):
        return [text]
    start = next((i for i, c in enumerate(text) if c == "{" and text[i - 1 : i] != "@"), None)
    if start is None:
        return [text]
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            break
    out = []
    for option in _split(text[start + 1 : end], pattern):
        out += _expand(text[:start] + option.strip() + text[end + 1 :], pattern)
    return out


def _member(text: str, pattern: str) -> Member:
    body = text
    exclude = body.startswith("!")
    body = body[1:].strip() if exclude else body
    found = _NAME.match(body)
    if found:
        tower, regex = found.group()[:-5].rstrip("/"), body[found.end() :]
        try:
            re.compile(regex)
        except (re.error, RecursionError, OverflowError) as e:
            raise SiteError(f"{_short(regex)!r} is not a regular expression: {e}", where=_short(pattern)) from None
        if _runs_away(regex):
            raise SiteError(
                f"{_short(regex)!r} could run for ever: repetition within repetition, or over {MOST_REPEATS} times '*', '+' or '{{n,}}'",
                fix=r"Plain '.*' will do: name:.*\.q_proj",
            )
        if not regex:
            raise SiteError(f"name: needs a regular expression in {_short(pattern)!r}", fix=r"For example name:.*\.q_proj")
        return Member(text, regex=regex, tower=tower, exclude=exclude)
    body, at, layers = body.partition("@")
    if at:
        _layers(layers.strip(), 1, pattern)
    tower, slash, role = body.rpartition("/")
    if (slash and not tower.strip()) or not role.strip():
        raise SiteError(f"{text!r} names no role" if not role.strip() else f"{text!r} names no tower before '/'", where=_short(pattern))
    return Member(text, role.strip(), "", tower.strip(), layers.strip(), exclude)


MOST_REPEATS = 5


def _runs_away(regex: str) -> bool:
    """Whether matching could take time without bound: a repeated group with a choice or a repetition in it, or many
    repetitions in a row. Python's matcher has no limit of its own, and a pattern may come from a file."""
    text = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", regex)  # escapes and character classes are one character each
    repeats = 0
    groups = [False]  # for each open group, whether it holds a choice or a repetition
    for i, c in enumerate(text):
        many = re.match(r"[*+]|\{\d*,\d*\}|\{\d{2,}\}", text[i:]) is not None
        if c == "(":
            groups.append(False)
        elif c == ")" and len(groups) > 1:
            inside = groups.pop()
            if inside and re.match(r"[*+]|\{\d*,|\{\d", text[i + 1 :]):
                return True
            groups[-1] = groups[-1] or inside
        elif c == "|" or many:
            repeats += many
            groups[-1] = True
    return repeats > MOST_REPEATS


def _layers(text: str, count: int, pattern: str) -> set[int]:
    """The numbers of `count` layers that '@text' takes. One that does not exist is left out here."""
    try:
        if text.startswith("{") and text.endswith("}"):
            found: set[int] = set()
            for part in text[1:-1].split(","):
                found |= _layers(part.strip(), count, pattern)
            return found
        if ":" not in text:
            n = int(text)
            return {n + count if n < 0 else n} & set(range(count))
        parts = text.split(":")
        if len(parts) > 3:
            raise ValueError
        return set(range(count)[slice(*(int(p) if p.strip() else None for p in parts))])
    except ValueError:
        raise SiteError(
            f"'@{text}' is not a layer, a slice or a list of layers", where=_short(pattern), fix="Write @3, @8:, @:4, @-2:, @::2 or @{0,5}"
        ) from None


def _match(m: Member, here: list[Site], *, tower: bool = True, layers: bool = True) -> set[int]:
    """Indices into `here` of what `m` takes; its tower or its layers may be set aside, to say which of them fails."""
    hits: set[int] = set()
    counts: dict[str, int] = {}
    if m.layers and layers:
        for s in here:
            if s.layer is not None:
                counts[s.tower] = max(counts.get(s.tower, 0), s.layer + 1)
    regex = re.compile(m.regex) if m.regex else None
    for i, s in enumerate(here):
        if m.tower and tower and not fnmatchcase(s.tower, m.tower):
            continue
        if regex is not None:
            if not _named(regex, s.path):
                continue
        elif not _role(m.role, s):
            continue
        if m.layers and layers and (s.layer is None or s.layer not in _layers(m.layers, counts[s.tower], m.text)):
            continue
        hits.add(i)
    return hits


def _named(regex: re.Pattern[str], path: str) -> bool:
    parts = path.split(".")
    return any(regex.fullmatch(".".join(parts[i:])) for i in range(len(parts)))


def _role(role: str, s: Site) -> bool:
    if role == "all":
        return s.role != "layer"
    if role == "linear":
        return s.port == "weight" and s.kind in LINEAR and s.role not in ("head", "router")
    if s.role == role or (role and fnmatchcase(s.role, role) and s.role != ""):
        return True
    return s.port in ("weight", "param") and s.role.startswith(role + ".")


def _nothing(m: Member, here: list[Site], port: str, whole: str = "") -> SiteError:
    """The error for a member that matches nothing: which part of it fails, and what there is instead."""
    what = f"{_short(m.text)!r} matches nothing on the {port} port" + (f" (of the pattern {_short(whole)!r})" if whole else "")
    if m.tower and _match(m, here, tower=False):
        towers = list(dict.fromkeys(s.tower for s in here if s.tower))
        if not any(fnmatchcase(t, m.tower) for t in towers):
            return SiteError(what, fix=f"There is no tower {m.tower!r}. {_list('Towers', towers)}")
    if m.layers and (hits := _match(m, here, layers=False)):
        numbers = sorted({n for i in hits if (n := here[i].layer) is not None})
        if not numbers:
            return SiteError(what, fix=f"{m.role!r} lies outside the layers here; leave '@{m.layers}' out")
        total = sorted({s.layer for s in here if s.layer is not None})
        there = f"layers 0 to {numbers[-1]}" if len(numbers) == numbers[-1] + 1 else "layers " + ", ".join(map(str, numbers))
        less = "" if len(total) == len(numbers) else f" (of {len(total)})"
        return SiteError(what, fix=f"{m.role!r} is in {there}{less} here")
    if m.regex:
        paths = list(dict.fromkeys(s.path for s in here))
        plain = re.sub(r"\\(.)", r"\1", m.regex).strip("^$").replace(".*", "")
        tails = {p.rsplit(".", 1)[-1]: p for p in paths}
        close = nearest(plain, paths) or [tails[t] for t in nearest(plain.rsplit(".", 1)[-1], tails)]
        return SiteError(what, fix=_list("The nearest modules are" if close else "Modules here are", close or paths))
    roles = list(dict.fromkeys(s.role for s in here if s.role))
    words = [*roles, *dict.fromkeys(r.split(".")[0] for r in roles)] + (["linear"] if port == "weight" else []) + ["all"]
    close = nearest(m.role, words)
    hint = "Did you mean " + " or ".join(repr(c) for c in close) + "? " if close else ""
    return SiteError(what, fix=hint + (_list("Roles here", roles) if roles else "No site of this port has a role; use 'all' or name:REGEX"))


def _list(lead: str, items: list[str], most: int = 24) -> str:
    return f"{lead}: " + ", ".join(items[:most]) + (", …" if len(items) > most else "")
