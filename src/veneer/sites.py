"""Sites: the places of a model where a method may act, and the patterns that choose among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from .errors import SiteError, did_you_mean

PORTS = ("weight", "param", "hidden", "kv", "embed")


@dataclass(frozen=True)
class Slice:
    """A part of an output dimension of size `groups * stride`: rows `start:stop` of every group.

    A contiguous part has one group. GPT-NeoX's fused qkv has a group for each head, of stride 3 * head_dim.
    """

    groups: int
    stride: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.groups * (self.stop - self.start)


@dataclass(frozen=True)
class Site:
    """A place where a method may act.

    path    the module that is changed there ('' is the model itself)
    port    'weight', 'param', 'hidden', 'kv' or 'embed'
    role    'attn.q', 'ffn.down', 'attn', 'norm', 'head', …; '' where structure gives none
    layer   number of the layer in its tower, counted from 0; None outside the layers
    tower   'encoder', 'decoder', 'text', 'vision', 'audio'

    weight  the map y = Wx + b. `kind` is 'linear' (W is out x in), 'transposed' (HF Conv1D, in x out), 'conv',
            'embedding' (V x d; out = d, in = V), 'tensor' (a 2-D parameter that its module's forward reads itself, as
            nn.MultiheadAttention's in_proj_weight; out x in) or 'experts' (a 3-D parameter E x out x in, or
            E x in x out where `transposed`). `tensor` names the parameter, `out` and `inp` are the sizes of the part
            that the site covers, `slice` says which part of the output dimension that is (None: all of it).
    param   `tensor` is the name of a parameter of `path`, of `shape`.
    hidden  h is what `path` returns, x is the first input of `enter`; both have `width` channels.
    kv      `path` is the attention module, x the first input of `enter`; `heads` key/value heads of `head_dim`;
            `via` is the mechanism ('registry': transformers' AttentionInterface; 'sdpa': the module calls
            F.scaled_dot_product_attention itself).
    embed   `path` is the module that takes the embedded sequence as its argument `argument`; `enter` is the token
            embedding ('' where the sequence comes embedded); `keep` leading positions (a CLS token) stay first.
    """

    path: str
    port: str
    role: str = ""
    layer: int | None = None
    tower: str = ""
    kind: str = ""
    tensor: str = ""
    shape: tuple[int, ...] = ()
    out: int = 0
    inp: int = 0
    slice: Slice | None = None
    experts: int = 0
    transposed: bool = False
    enter: str = ""
    width: int = 0
    heads: int = 0
    head_dim: int = 0
    via: str = ""
    argument: str = ""
    keep: int = 0
    causal: bool = False
    batch_dim: int = 0


# -- patterns ---------------------------------------------------------------------------------------------------------
LINEAR = ("linear", "transposed", "tensor", "experts")
BLOCKS = ("attn", "cross", "ffn", "mixer")


@dataclass(frozen=True)
class Member:
    """One parsed member of a pattern."""

    text: str
    role: str = ""
    tower: str = ""
    layers: slice | tuple[int, ...] | None = None
    regex: re.Pattern[str] | None = None
    exclude: bool = False


@lru_cache(maxsize=512)
def parse(pattern: str) -> tuple[Member, ...]:
    """The members of `pattern`. Raises: SiteError that quotes it."""
    members: list[Member] = []
    for text in _split(pattern):
        exclude, body = text.startswith("!"), text.removeprefix("!").strip()
        if body.startswith("name:"):
            try:
                regex = re.compile(body.removeprefix("name:"))
            except re.error as e:
                raise SiteError(f"{body!r} is not a regular expression: {e}", where=f"pattern {pattern!r}") from None
            members.append(Member(text, regex=regex, exclude=exclude))
            continue
        body, at, layers = body.partition("@")
        tower, slash, role = body.rpartition("/")
        for one in _expand(role.strip(), pattern):
            if not one or (slash and not tower):
                raise SiteError("an empty member", where=f"pattern {pattern!r}", fix="Write roles such as 'attn.{q,v}'")
            members.append(Member(text, one, tower.strip(), _layers(layers, pattern) if at else None, exclude=exclude))
    if not members or all(m.exclude for m in members):
        raise SiteError("a pattern with nothing in it", where=f"pattern {pattern!r}", fix="Write roles such as 'attn.{q,v}'")
    return tuple(members)


def _split(pattern: str) -> list[str]:
    """At commas outside braces; 'name:' takes the rest."""
    out, depth, start, i = [], 0, 0, 0
    while i < len(pattern):
        if depth == 0 and pattern[start:].lstrip().removeprefix("!").startswith("name:"):
            break
        c = pattern[i]
        depth += (c == "{") - (c == "}")
        if depth < 0:
            break
        if c == "," and depth == 0:
            out.append(pattern[start:i].strip())
            start = i + 1
        i += 1
    if depth and not pattern[start:].lstrip().startswith("name:"):
        raise SiteError("unbalanced braces", where=f"pattern {pattern!r}")
    out.append(pattern[start:].strip())
    if any(not m for m in out):
        raise SiteError("an empty member", where=f"pattern {pattern!r}", fix="Write roles such as 'attn.{q,v}'")
    return out


def _expand(text: str, pattern: str) -> list[str]:
    open_ = text.find("{")
    if open_ < 0:
        if "}" in text:
            raise SiteError("unbalanced braces", where=f"pattern {pattern!r}")
        return [text]
    close = text.find("}", open_)
    if close < 0:
        raise SiteError("unbalanced braces", where=f"pattern {pattern!r}")
    out: list[str] = []
    for option in text[open_ + 1 : close].split(","):
        if not option.strip():
            raise SiteError("an empty member in braces", where=f"pattern {pattern!r}")
        out += _expand(text[:open_] + option.strip() + text[close + 1 :], pattern)
    return out


def _layers(text: str, pattern: str) -> slice | tuple[int, ...]:
    text = text.strip()
    try:
        if text.startswith("{") and text.endswith("}"):
            return tuple(int(t) for t in text[1:-1].split(","))
        if ":" in text:
            bounds = [int(t) if t.strip() else None for t in text.split(":")]
            if len(bounds) > 3 or (len(bounds) == 3 and bounds[2] == 0):
                raise ValueError
            return slice(*bounds)
        return (int(text),)
    except ValueError:
        raise SiteError(
            f"{text!r} is not a layer slice", where=f"pattern {pattern!r}", fix="Write '@8:', '@:4', '@-2:', '@3' or '@{0,5}'"
        ) from None


def _role_matches(site: Site, role: str, port: str) -> bool:
    if role == "all":
        return True
    if role == "linear":
        return site.kind in LINEAR and site.role not in ("head", "ffn.router")
    if site.role == role or fnmatchcase(site.role, role):
        return bool(site.role)
    return role in BLOCKS and port in ("weight", "param") and site.role.startswith(role + ".")


def select(sites: Sequence[Site], pattern: str, *, port: str, default: bool = False, why: str = "") -> list[Site]:
    """The sites of `port` that `pattern` matches, in the model's order.

    A pattern is a comma list of members, each `[tower/]role[@layers]` or `name:REGEX`: braces and * as in a shell
    ('attn.{q,v}', 'ffn.*'), layers as a Python slice, a number or a set ('@8:', '@-1', '@{0,5}'). 'linear' is every
    linear map but the head, 'all' every site of the port, a block ('attn', 'ffn') at the weight and param ports all of
    its members. 'name:' takes a regular expression for the module's whole path, or the end of it from a dot on, and the
    rest of the pattern. '!member' takes its matches out again.

    default   a method's own default: members that match nothing are dropped, unless all of them are

    Raises: SiteError for each member that matches nothing, naming the nearest roles.
    """
    here = [s for s in sites if s.port == port]
    if not here:
        raise SiteError(f"this model has no {port!r} port", fix=why or f"It has: {', '.join(dict.fromkeys(s.port for s in sites))}")
    counts: dict[str, int] = {}
    for s in here:
        if s.layer is not None:
            counts[s.tower] = max(counts.get(s.tower, 0), s.layer + 1)
    chosen: dict[Site, None] = {}
    for m in parse(pattern):
        found = [s for s in here if _matches(s, m, port, counts)]
        if not found and not default:
            raise _nothing(here, m, port, counts, why)
        for s in found:
            if m.exclude:
                chosen.pop(s, None)
            else:
                chosen[s] = None
    if not chosen:
        if default:
            raise _nothing(here, parse(pattern)[0], port, counts, why)
        raise SiteError("nothing is left of the pattern", where=f"pattern {pattern!r}")
    return [s for s in here if s in chosen]


def _matches(s: Site, m: Member, port: str, counts: dict[str, int]) -> bool:
    if m.regex is not None:
        parts = s.path.split(".")
        return any(m.regex.fullmatch(".".join(parts[i:])) for i in range(len(parts)))
    if m.tower and s.tower != m.tower:
        return False
    if not _role_matches(s, m.role, port):
        return False
    if m.layers is None:
        return True
    if s.layer is None:
        return False
    n = counts[s.tower]
    if isinstance(m.layers, slice):
        return s.layer in range(n)[m.layers]
    return s.layer in {x + n if x < 0 else x for x in m.layers}


def _nothing(here: Sequence[Site], m: Member, port: str, counts: dict[str, int], why: str) -> SiteError:
    where = f"pattern {m.text!r}, port {port!r}"
    if m.regex is not None:
        return SiteError("no module's name matches", where=where, fix=did_you_mean(m.regex.pattern, [s.path for s in here]))
    roles = [r for r in dict.fromkeys(s.role for s in here) if r]
    towers = list(dict.fromkeys(s.tower for s in here if s.tower))
    if m.tower and m.tower not in towers:
        return SiteError(f"there is no tower {m.tower!r}", where=where, fix=did_you_mean(m.tower, towers))
    if not any(_role_matches(s, m.role, port) for s in here):
        fix = did_you_mean(m.role, [*roles, *[r for r in ("linear", "all") if port == "weight"]])
        return SiteError(f"{m.role!r} matches nothing in this model", where=where, fix=f"{fix} Roles here: {', '.join(roles) or 'none'}")
    n = "; ".join(f"{t or 'the model'} has layers 0 to {c - 1}" for t, c in counts.items())
    return SiteError(f"{m.role!r} matches nothing in those layers", where=where, fix=n)
