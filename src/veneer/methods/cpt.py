"""Context-aware prompt tuning: a prompt of worked examples, each token of which may move a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import EmbedPart
from .prompt import looked_up


@dataclass(frozen=True)
class CPT(Method):
    """Context-aware prompt tuning (Blau et al., 2024, arXiv 2410.17222).

        input = [P; E(x)],   P_i = E(t_i) + δ_i,   ‖δ_i‖₂ ≤ ε_i √(d / 2048);   δ_i = 0 where t_i is a label of the examples

        vn.CPT.of([("great fun", "good"), ("a bore", "bad")], tokenizer)      # 'input: great fun output: good\\n…'

    ids      t, the tokens of the examples
    kinds    what each is: 4 j + 1 the format before the input of example j = 0, 1, …, 4 j + 2 its input, 4 j + 3 the format
             before its label, 4 j + 4 its label, 0 none of these, as in Hugging Face PEFT; all 1 by default
    bound    ε of inputs, format of the format; 0.1 by default (PEFT's)
    context  weight of the loss on the labels of the examples themselves, in vn.penalty: the mean over their tokens of
             decay^(J - j) times the cross-entropy; 1 by default. (PEFT takes one mean over these and the batch's labels)
    decay    1 by default (PEFT's)
    at       'embed' of the first tower, which is causal where `context` is not 0

    δ is projected onto its ball whenever it is used, and after each step by vn.advance (the paper's projected descent).
    Not the identity at the start: δ = 0 there, so P is the text itself. Parameters: d for every token that moves.
    Raises: PlanError, SiteError.
    """

    name = "cpt"
    family = "soft prompt"
    ports = ("embed",)
    paper = "arXiv 2410.17222"
    identity_at_init = False
    default_at = "embed"
    rate = (1e-3, "a tenth of prompt tuning's here: the balls are small")

    ids: tuple[int, ...] = ()
    kinds: tuple[int, ...] | None = None
    bound: float = 0.1
    format: float = 0.1
    context: float = 1.0
    decay: float = 1.0
    at: str | None = None

    def __post_init__(self) -> None:
        for key in ("ids", "kinds"):
            value = getattr(self, key)
            if key == "kinds" and value is None:
                continue
            if not isinstance(value, tuple) or not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
                raise self._fail(f"{key} are whole numbers of at least 0, one for each token", "Make both from a text: vn.CPT.of(examples, tokenizer)")
        if self.kinds is not None and len(self.kinds) != len(self.ids):
            raise self._fail(f"there are {len(self.kinds)} kinds for {len(self.ids)} ids")
        if not any(self.moving()):
            raise self._fail("no token may move: all are labels", "Give kinds that are no multiples of 4 to those that may")
        self._finite(bound=self.bound, format=self.format, context=self.context, decay=self.decay)
        if min(self.bound, self.format) <= 0 or self.context < 0 or not 0 <= self.decay <= 1:
            raise self._fail("bound and format must be positive, context at least 0, and decay from 0 to 1")
        self._pattern()

    @classmethod
    def of(
        cls, examples: Sequence[tuple[str, str]], tokenizer: Any, *, before: str = "input: ", between: str = " output: ", after: str = "\n", **options: Any
    ) -> CPT:
        """The prompt `before` input `between` label `after` …, for (input, label) in `examples`, in the tokens of `tokenizer`."""
        ids, kinds = [], []
        for j, (text, label) in enumerate(examples):
            for kind, piece in ((1, before), (2, text), (3, between), (4, label), (3, after)):
                own = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += own
                kinds += [4 * j + kind] * len(own)
        return cls(tuple(ids), tuple(kinds), **options)

    def moving(self) -> list[bool]:
        return [k % 4 != 0 for k in self.kinds or [1] * len(self.ids)]

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        found = sites(self.at, "embed", self.default_at)
        for site in found if self.at is not None else found[:1]:
            yield site, CPTPart(site, build, self)

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        for p in parts:
            with torch.no_grad():
                p.delta.copy_(p.within())


class CPTPart(EmbedPart):
    """vectors (n, d): E(t), frozen; delta (m, d) of the m tokens `free`, whose norms are at most `most`."""

    vectors: Tensor
    free: Tensor
    most: Tensor

    def __init__(self, site: Site, build: Build, m: CPT) -> None:
        super().__init__(site)
        new, kinds = like(build, site), m.kinds or (1,) * len(m.ids)
        if not build.blank and m.context and not site.causal:
            raise m._fail(f"the examples' labels are predicted from what stands before them, and {site.path or 'this model'} is not causal", "Use context=0")
        free = [i for i, moves in enumerate(m.moving()) if moves]
        self.frozen("vectors", looked_up(m, site, build, list(m.ids)))
        self.frozen("free", torch.tensor(free, dtype=torch.int32, device=new["device"]))
        self.frozen("most", torch.tensor([m.bound if kinds[i] % 4 == 2 else m.format for i in free], **new) * (site.width / 2048) ** 0.5)
        self.delta = nn.Parameter(torch.zeros(len(free), site.width, **new))
        self.keep, self.context = site.keep, m.context
        labels = [(i, m.ids[i], (k - 1) // 4) for i, k in enumerate(kinds) if k and k % 4 == 0 and i]
        self.labels = [(i, t, m.decay ** (max(kinds) // 4 - j)) for i, t, j in labels]
        self.__dict__["model"] = build.model

    def within(self) -> Tensor:
        """delta, or where it is too long the nearest that is not."""
        return self.delta * (self.most / self.delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]

    def prompt(self) -> Tensor:
        d = self.delta + (self.within() - self.delta).detach()
        return self.vectors.index_add(0, self.free.long(), d)

    def penalty(self) -> Tensor | None:
        """The loss on the examples' labels. What comes after them does not change it, so the prompt is run by itself."""
        if not (self.training and self.context and self.labels):
            return None
        from ..adapter import disabled

        at, ids, weights = zip(*self.labels, strict=True)
        base = next(self.model.parameters())
        with disabled(self.model):
            logits = self.model(inputs_embeds=self.prompt()[None].to(base.dtype)).logits[0, [i - 1 for i in at]].float()
        loss = nn.functional.cross_entropy(logits, torch.tensor(ids, device=logits.device), reduction="none")
        return self.context * (loss * loss.new_tensor(weights)).mean()
