"""P-tuning: prompts that come out of a small encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site
from .base import Build, Method
from .part import Part, like
from .parts import EmbedPart


@dataclass(frozen=True)
class PTuning(Method):
    """P-tuning (Liu et al., 2021, arXiv 2103.10385).

        input = [P; E(x)],   P = encoder(Z),   Z (n, d)

        mlp    P = W₃ relu(W₂ relu(W₁ Z + b₁) + b₂) + b₃
        lstm   P = W₂ relu(W₁ LSTM(Z) + b₁) + b₂, a bidirectional LSTM along the n vectors

    length     n; 10 by default
    encoder    'mlp' (default), 'lstm' (the paper's)
    hidden     the encoder's width; d by default
    layers     of the LSTM; 2 by default (the paper's)
    dropout    between the LSTM's layers; 0 by default
    before_cls put P before an encoder's CLS token (as Hugging Face PEFT does) and not after it
    at         'embed' of the first tower by default

    The encoder only helps the training: saved is P alone. Mask, positions, labels and logits are kept as in vn.PromptTuning;
    for prompts in every layer (P-tuning v2) see vn.Prefix. Not the identity at the start. Parameters: n d, and the encoder's
    while training (3 hidden d or more). Raises: PlanError, SiteError.
    """

    name = "p-tuning"
    family = "soft prompt"
    ports = ("embed",)
    paper = "arXiv 2103.10385"
    identity_at_init = False
    default_at = "embed"

    length: int = 10
    encoder: str = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0
    before_cls: bool = False
    at: str | None = None

    def __post_init__(self) -> None:
        self._positive(length=self.length, layers=self.layers)
        if self.hidden is not None:
            self._positive(hidden=self.hidden)
        self._one_of(("mlp", "lstm"), encoder=self.encoder)
        self._share(dropout=self.dropout)
        self._bool(before_cls=self.before_cls)
        self._pattern()

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        found = sites(self.at, "embed", self.default_at)
        for site in found if self.at is not None else found[:1]:
            yield site, PTuningPart(site, build, self)


class PTuningPart(EmbedPart):
    def __init__(self, site: Site, build: Build, m: PTuning) -> None:
        super().__init__(site)
        new, d = like(build, site), site.width
        width = m.hidden or d
        self.vectors = nn.Parameter(torch.empty(m.length, d, **new).normal_(std=0.02 if build.blank else 1.0))
        self.lstm = None
        if m.encoder == "lstm":
            self.lstm = nn.LSTM(d, width, m.layers, dropout=m.dropout, bidirectional=True, batch_first=True, **new)
            self.mlp = nn.Sequential(nn.Linear(2 * width, 2 * width, **new), nn.ReLU(), nn.Linear(2 * width, d, **new))
        else:
            steps = (nn.Linear(d, width, **new), nn.ReLU(), nn.Linear(width, width, **new), nn.ReLU(), nn.Linear(width, d, **new))
            self.mlp = nn.Sequential(*steps)
        self.keep = 0 if m.before_cls else site.keep

    def prompt(self) -> Tensor:
        if self.mlp is None:
            return self.vectors
        z = self.vectors if self.lstm is None else self.lstm(self.vectors[None])[0][0]
        return self.mlp(z)

    def folded(self) -> dict[str, Tensor]:
        """What is saved: the encoder's result in its place."""
        return {"vectors": self.prompt().detach()}

    def unfold(self, saved: dict[str, Tensor]) -> None:
        """Take the form without an encoder."""
        self.lstm = self.mlp = None
