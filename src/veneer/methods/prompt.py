"""Prompt tuning: learnt vectors before the embedded input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..code import own_class
from ..sites import Site
from .base import Build, Method
from .part import Part, like, module_at
from .parts import EmbedPart


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning (Lester et al., EMNLP 2021, arXiv 2104.08691).

        input = [P; E(x)],   P (n, d)

    The attention mask, positions and token types grow with the input; the virtual tokens are cut from the tower's
    output again, so labels and logits keep the user's length (an encoder-decoder's decoder still sees theirs).

    length      n; 10 by default (the paper: 20 to 100)
    init        'random' (N(0, 0.02²)), 'vocab' (rows of the token embedding, drawn at random; the paper's), or 'text'
    text        the hand-written prompt whose token embeddings start P, repeated or cut to n tokens; needs the
                `tokenizer` given to vn.attach. With length=None its own length is taken
    fixed       leave P as its start is: a hand-written prompt, beside what else the plan trains; False by default
    before_cls  put P before an encoder's CLS token (as Hugging Face PEFT does) and not after it
    at          'embed' of the first tower by default; 'decoder/embed', 'vision/embed', …

    A gate scales P itself, by one number for each example; at g = 0 the n positions are still there, as zeros.

    Parameters: n d. Not the identity at the start. Raises: PlanError, SiteError.
    """

    name = "prompt"
    family = "soft prompt"
    ports = ("embed",)
    paper = "arXiv 2104.08691"
    identity_at_init = False
    default_at = "embed"
    rate = (1e-2, "between P-tuning v2's and prompt tuning's 0.3 with Adafactor (Lester et al. 2021)")

    length: int | None = 10
    init: str = "random"
    text: str | None = None
    fixed: bool = False
    before_cls: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            self._positive(length=self.length)
        self._bool(before_cls=self.before_cls, fixed=self.fixed)
        if self.text is not None and not isinstance(self.text, str):
            raise self._fail(f"text must be a string, not {self.text!r}")
        self._one_of(("random", "vocab", "text"), init=self.init)
        if (self.init == "text") != (self.text is not None):
            raise self._fail("init='text' and text=... go together", "Give both, or neither")
        if self.length is None and self.init != "text":
            raise self._fail("length may be None only with init='text'")
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        found = sites(self.at, "embed", self.default_at)
        for site in found if self.at is not None else found[:1]:
            build.module = module_at(build.model, site.path)
            yield site, self.part(site, build)

    def part(self, site: Site, build: Build) -> Part:
        return PromptPart(site, build, self)

    def start(self, site: Site, build: Build) -> Tensor:
        """The initial P (n, d)."""
        new = like(build, site)
        if build.blank:
            return torch.empty(self.length or 0, site.width, **new)
        if self.init == "random":
            return torch.empty(self.length or 0, site.width, **new).normal_(std=0.02)
        if self.init == "vocab":
            ids = torch.randint(table_of(self, site, build).weight.shape[0], (self.length or 0,)).tolist()
        else:
            if build.tokenizer is None:
                raise self._fail("init='text' needs a tokenizer", "Give it: vn.attach(model, plan, tokenizer=tokenizer)")
            ids = build.tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if not len(ids):
                raise self._fail(f"the text {self.text!r} has no tokens")
            n = self.length or len(ids)
            ids = (ids * -(-n // len(ids)))[:n]
        return looked_up(self, site, build, ids)


def table_of(m: Method, site: Site, build: Build) -> nn.Embedding:
    """The token embedding behind an embed site. Raises: PlanError where there is none."""
    if not site.enter:
        raise m._fail(f"this start needs a token embedding, and {site.path or 'this model'} has none")
    return module_at(build.model, site.enter)  # type: ignore[return-value]


def looked_up(m: Method, site: Site, build: Build, ids: list[int]) -> Tensor:
    """The embeddings (n, d) of the tokens `ids`, as new tensors. Raises: PlanError for a token that is none."""
    new = like(build, site)
    if build.blank:
        return torch.empty(len(ids), site.width, **new)
    table = table_of(m, site, build)
    if max(ids) >= table.weight.shape[0]:
        raise m._fail(f"there is no token {max(ids)}: {site.enter!r} has {table.weight.shape[0]}", "Use the base's own tokenizer")
    with torch.no_grad():  # as the embedding itself gives them: some scale what they look up
        return own_class(table).forward(table, torch.tensor(ids, device=table.weight.device)).to(**new).clone()  # type: ignore[attr-defined]


class PromptPart(EmbedPart):
    def __init__(self, site: Site, build: Build, m: PromptTuning) -> None:
        super().__init__(site)
        start = m.start(site, build)
        self.fixed = m.fixed
        if m.fixed:
            self.frozen("vectors", start)
        else:
            self.vectors = nn.Parameter(start)
        self.keep = 0 if m.before_cls else site.keep
        self.free = m.length is None  # as long as its text, in whatever tokenizer it was attached with

    def prompt(self) -> Tensor:
        return self.vectors

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """Take the saved prompt's length, where the text gave it."""
        vectors = saved.get("vectors")
        if self.free and vectors is not None and vectors.dim() == 2:
            blank = self.vectors.new_empty(vectors.shape[0], self.vectors.shape[1])
            self.vectors = blank if self.fixed else nn.Parameter(blank)
