"""The pattern language, on sites made by hand and on real models: what it takes, and what it says of what is not there."""

from __future__ import annotations

import random
from typing import Any

import pytest

import veneer as vn
from helpers import build, refuses
from veneer.patterns import parse, select
from veneer.sites import Site

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")


def tower(name: str, layers: int, roles: tuple[str, ...] = ROLES) -> list[Site]:
    return [Site(f"{name}.layers.{i}.{r.replace('.', '_')}", "weight", r, i, name, kind="linear") for i in range(layers) for r in roles]


SITES = [
    *tower("text", 4),
    *tower("vision", 2),
    Site("text.router", "weight", "router", 0, "text", kind="linear"),
    Site("text.embed", "weight", "embed", None, "text", kind="embedding"),
    Site("odd.projection", "weight", "", None, "", kind="linear"),
    Site("head", "weight", "head", None, "", kind="linear"),
    Site("text.layers.0.attn", "hidden", "attn", 0, "text"),
    Site("text.layers.1.attn", "hidden", "attn", 1, "text"),
    Site("text.layers.1.ffn", "hidden", "ffn", 1, "text"),
]
WEIGHT = [s for s in SITES if s.port == "weight"]


def take(pattern: str, **options: Any) -> set[str]:
    return {s.path for s in select(SITES, pattern, **{"port": "weight", **options})}


def where(**fields: Any) -> set[str]:
    """Paths of the weight sites whose field is one of those given."""
    return {s.path for s in WEIGHT if all(getattr(s, k) in v for k, v in fields.items())}


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        ("attn.q", where(role=["attn.q"])),
        ("attn.{q,v}", where(role=["attn.q", "attn.v"])),
        ("attn.q,attn.v", where(role=["attn.q", "attn.v"])),
        (" attn.{ q , v } ", where(role=["attn.q", "attn.v"])),
        ("{attn.{q,v},ffn.up}", where(role=["attn.q", "attn.v", "ffn.up"])),
        ("{attn,ffn}.{o,up,down}", None),  # attn.up is nowhere
        ("attn", where(role=ROLES[:4])),
        ("attn.*", where(role=ROLES[:4])),
        ("*.{q,down}", where(role=["attn.q", "ffn.down"])),
        ("ff?.down", where(role=["ffn.down"])),
        ("linear", {s.path for s in WEIGHT if s.kind == "linear" and s.role not in ("head", "router")}),
        ("all", {s.path for s in WEIGHT}),
        ("!head", {s.path for s in WEIGHT} - {"head"}),
        ("linear,!ffn", {s.path for s in WEIGHT if s.kind == "linear" and s.role not in ("head", "router", "ffn.up", "ffn.down")}),
        ("linear,!ffn,ffn.up@0", None),
        ("attn.q@0", where(role=["attn.q"], layer=[0])),
        ("attn.q@-1", {"text.layers.3.attn_q", "vision.layers.1.attn_q"}),
        ("attn.q@2:", where(role=["attn.q"], layer=[2, 3])),
        ("attn.q@:2", where(role=["attn.q"], layer=[0, 1])),
        ("attn.q@-2:", {"text.layers.2.attn_q", "text.layers.3.attn_q", "vision.layers.0.attn_q", "vision.layers.1.attn_q"}),
        ("attn.q@::2", where(role=["attn.q"], layer=[0, 2])),
        ("attn.q@{0,3}", where(role=["attn.q"], layer=[0, 3])),
        ("attn.q@{0,-1}", {"text.layers.0.attn_q", "vision.layers.0.attn_q", "text.layers.3.attn_q", "vision.layers.1.attn_q"}),
        ("attn.q@{:1,3}", where(role=["attn.q"], layer=[0, 3])),
        ("vision/attn.q", where(role=["attn.q"], tower=["vision"])),
        ("{vision,text}/attn.q", where(role=["attn.q"])),
        ("v*/attn.{q,k}@1", where(role=["attn.q", "attn.k"], tower=["vision"], layer=[1])),
        ("name:odd\\.projection", {"odd.projection"}),
        ("name:projection", {"odd.projection"}),
        (r"name:.*\.1\.attn_(q|v),?", where(role=["attn.q", "attn.v"], layer=[1])),
        (r"text/name:.*attn_q", where(role=["attn.q"], tower=["text"])),
        (r"name:(text|vision)\.layers\.\d+\.(attn_q|[(+*]?attn_k)", where(role=["attn.q", "attn.k"])),
        (r"head,name:.*attn_[qk]", where(role=["attn.q", "attn.k"]) | {"head"}),
        (r"all,!name:text\..*", {s.path for s in WEIGHT if not s.path.startswith("text.")}),
        (r"name:layers\.[0-9]{1,2}\.ffn_up", where(role=["ffn.up"])),
    ],
)  # fmt: skip
def test_patterns(pattern: str, same: set[str] | None) -> None:
    if same is None:
        pattern_ = pattern
        if pattern_.startswith("{"):
            with refuses(vn.SiteError, "'attn.up' matches nothing"):
                take(pattern)
            return
        assert take(pattern) == take("linear,!ffn") | where(role=["ffn.up"], layer=[0])
        return
    assert take(pattern) == same
    order = [s.path for s in select(SITES, pattern, port="weight")]
    assert order == [s.path for s in WEIGHT if s.path in same], "in the model's order"


def test_ports_differ() -> None:
    assert take("attn", port="hidden") == {"text.layers.0.attn", "text.layers.1.attn"}
    assert take("attn@1,ffn", port="hidden") == {"text.layers.1.attn", "text.layers.1.ffn"}
    with refuses(vn.SiteError, "'attn.q' matches nothing on the hidden port", "Roles here: attn, ffn"):
        take("attn.q", port="hidden")
    with refuses(vn.SiteError, "needs the kv port, which this model does not have: it is odd"):
        take("attn", port="kv", why="it is odd")


@pytest.mark.parametrize("seed", range(40))
def test_laws(seed: int) -> None:
    """A list is the union of its members, ! takes away, braces multiply out, and layers and towers intersect."""
    dice = random.Random(seed)
    members = [dice.choice(ROLES) + dice.choice(["", "@0", "@1", "@:2", "@-1"]) for _ in range(dice.randint(1, 4))]
    members = [dice.choice(["", "", "text/", "vision/"]) + m for m in members]
    union = set().union(*(take(m) for m in members))
    assert take(",".join(members)) == union == take("{" + ",".join(m.replace("@:2", "@{0,1}") for m in members) + "}")
    assert take(" , ".join(reversed(members))) == union
    gone = dice.choice(ROLES)
    if union - take(gone):
        assert take(",".join(members) + f",!{gone}") == union - take(gone)
    tails = sorted({m.split("/")[-1].split("@")[0].split(".")[1] for m in members if "attn" in m})
    if tails:
        assert take("attn.{" + ",".join(tails) + "}") == set().union(*(take(f"attn.{t}") for t in tails))
    role = dice.choice(ROLES)
    assert take(f"text/{role}@1") == take(role) & where(tower=["text"]) & where(layer=[1])


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("atn.q", ["'atn.q' matches nothing on the weight port", "Did you mean 'attn.q'", "Roles here: attn.q"]),
        ("attn.q,ffn.upp", ["'ffn.upp' matches nothing", "Did you mean 'ffn.up'"]),
        ("attn.{q,w}", ["'attn.w' matches nothing", "attn.q"]),
        ("attn.q,!nrom", ["'!nrom' matches nothing"]),
        ("attn.q@4", ["'attn.q@4' matches nothing", "layers 0 to 3"]),
        ("vision/attn.q@2", ["matches nothing"]),
        ("attn.q@{0,7}", ["'attn.q@{0,7}' matches nothing|'attn.q@7'|@.0,7", "layers 0 to 3"]),
        ("head@0", ["outside the layers", "leave '@0' out"]),
        ("audio/attn.q", ["There is no tower 'audio'", "Towers: text, vision"]),
        ("name:text.layers.0.attn_w", ["matches nothing", "nearest modules are: text.layers.0.attn_"]),
        ("name:zzz", ["matches nothing", "Modules here are: text.layers.0"]),
        ("attn.q,,attn.v", ["empty member"]),
        ("", ["empty pattern"]),
        (" ", ["empty pattern"]),
        (",", ["empty member"]),
        ("!", ["names no role"]),
        ("@3", ["names no role"]),
        ("/attn.q", ["names no tower"]),
        ("attn.{q,v", ["never closed", "come in pairs"]),
        ("attn.q}", ["without '{'", "position 6"]),
        ("attn.{q,}", ["empty member|names no role|matches nothing"]),
        ("attn.q@x", ["'@x' is not a layer", "@3"]),
        ("attn.q@", ["matches nothing|not a layer"]),
        ("attn.q@1:2:3:4", ["not a layer"]),
        ("attn.q@::0", ["not a layer"]),
        ("attn.q@{0,}", ["not a layer"]),
        ("name:", ["needs a regular expression"]),
        ("name:(", ["not a regular expression"]),
        (r"name:(\w+)+!", ["could run for ever", "name:"]),
        (r"name:((a|b)x?)*!", ["could run for ever"]),
        (r"name:(\w*){20}!", ["could run for ever"]),
        ("name:" + ".*" * 6 + "!", ["could run for ever"]),
        ("attn,!attn", ["excludes every site"]),
        ("{a,b}" * 40, ["alternatives"]),
        ("{" * 3000 + "a" + "}" * 3000, ["nested more than"]),
        ("{" * 3000, ["nested more than|never closed"]),
    ],
)  # fmt: skip
def test_errors(pattern: str, texts: list[str]) -> None:
    with refuses(vn.SiteError, *texts):
        take(pattern)


@pytest.mark.parametrize("pattern", [None, 3, ["attn.q"], {"a": 1}, b"attn.q"])
def test_a_pattern_is_a_string(pattern: Any) -> None:
    with refuses(vn.SiteError, "a pattern is a string, not"):
        parse(pattern)


def test_any_text_is_read_or_refused() -> None:
    dice = random.Random(1)
    words = ["attn.q", "ffn", "{", "}", ",", "!", "@", ":", "/", "name:", "*", "?", "[", "]", "0", "-1", " ", "text", "\\", "(", ")", "|", "é", "\n"]
    for _ in range(3000):
        pattern = "".join(dice.choice(words) for _ in range(dice.randint(0, 12)))
        try:
            found = select(SITES, pattern, port="weight")
            assert found
        except vn.SiteError as e:
            assert len(str(e)) > 10


def test_defaults_take_what_there_is() -> None:
    assert take("attn.{q,k},cross.{q,k}", default=True) == where(role=["attn.q", "attn.k"])
    with refuses(vn.SiteError, "'cross.q' matches nothing", "of the pattern 'cross.q,cross.k'"):
        take("cross.q,cross.k", default=True)


def test_a_member_that_matches_nothing_attaches_nothing() -> None:
    model = build()
    for at, text in (("attn.q,attn.w", "'attn.w'"), ("attn.q@9", "layers 0 to 2"), ("attn.q,name:bert.nowhere", "nowhere"), ("attn.q@{0,5}", "layers 0 to 2")):
        with refuses(vn.SiteError, "matches nothing", text, model=model):
            vn.attach(model, vn.BitFit() + vn.LoRA(2, at=at))
    for plan in (vn.LoRA(2), vn.IA3(), vn.Bottleneck(2), vn.Prefix(2), vn.PromptTuning(2), vn.BitFit(), vn.Full()):
        vn.attach(model, plan)
        vn.detach(model)


def test_a_port_that_a_model_does_not_have() -> None:
    convnext = build("convnext")
    with refuses(vn.SiteError, "needs the kv port, which this model does not have", model=convnext):
        vn.attach(convnext, vn.LoRA(2, at="linear") + vn.Prefix(2))
    llama = build("llama")
    with refuses(vn.SiteError, "no bias", "vn.IA3", model=llama):
        vn.attach(llama, vn.BitFit())


def test_sites_of_a_model_can_be_named_one_by_one() -> None:
    for kind in ("bert", "gpt2", "bart"):
        found = vn.sites(build(kind))
        for s in found:
            if s.role and s.layer is not None:
                got = select(found, f"{s.tower}/{s.role}@{s.layer}" if s.tower else f"{s.role}@{s.layer}", port=s.port)
                assert s in got and all(g.layer == s.layer and g.role.startswith(s.role) for g in got)
            named = select(found, "name:" + s.path.replace(".", r"\."), port=s.port) if s.path else [s]
            assert s in named
