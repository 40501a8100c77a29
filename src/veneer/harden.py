"""Hard prompts: words in place of a learnt soft prompt, found by its nearest tokens and by a search along gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attach import state_of
from .calls import evaluating, moved
from .code import own_class
from .errors import AdapterError, CapabilityError, PlanError
from .methods.part import module_at
from .plan import whole


@dataclass
class Hardened:
    """What hardening found: each prompt's text, and the mean loss of the batches under it.

    soft      the learnt vectors' loss
    nearest   (text, loss): each vector's nearest token
    text, ids, loss   the best that the search found
    steps     [(text, loss)], one for each exchange of a token that helped
    tried     how many prompts were measured
    """

    text: str
    ids: list[int]
    loss: float
    soft: float
    nearest: tuple[str, float]
    steps: list[tuple[str, float]] = field(repr=False, default_factory=list)
    tried: int = 0

    def __str__(self) -> str:
        rows = [("soft", self.soft, "(vectors)"), ("nearest", self.nearest[1], repr(self.nearest[0])), ("searched", self.loss, repr(self.text))]
        return "\n".join(f"{name:<10}{loss:>10.4f}  {text}" for name, loss, text in rows)


def harden(
    model: nn.Module,
    tokenizer: Any,
    batches: Iterable[Any],
    name: str | None = None,
    *,
    start: str | None = None,
    steps: int = 20,
    tries: int = 64,
    candidates: int = 32,
    loss: Callable[[Any], Tensor] | None = None,
) -> Hardened:
    """Find a text that does what the soft prompt of the adapter `name` does. Nothing of the model is changed.

    nearest   token j is argmax_v cos(P_j, E_v), over the ordinary tokens of the vocabulary
    searched  from there, or from `start`, one token is exchanged at a time, as in HotFlip (Ebrahimi et al., ACL 2018, arXiv
              1712.06751) and AutoPrompt (Shin et al., EMNLP 2020, arXiv 2010.15980). For position j with embedding e_j and the
              gradient g_j of the loss there, the tokens with the largest (e_j - E_v)·g_j are measured; the best that helps
              is taken

    Only texts that the tokenizer reads back as the same tokens are measured, so that what is found can be typed.

    batches     what the model is called with, labels included (a list, or anything that can be gone through again)
    name        default: the one active adapter; it must have one soft prompt before the input (vn.PromptTuning, vn.PTuning, …)
    start       a text to search from, such as a hand-written prompt; default: the nearest tokens
    steps       at most so many exchanges; 20
    tries       prompts measured for each exchange; 64
    candidates  tokens considered at each position, best first; 32
    loss        the model's output -> the loss; default its `loss`

    Cost: steps · (tries + 1) passes over the batches. Raises: AdapterError, PlanError (no soft prompt, or several; numbers
    under 1; a start without tokens), CapabilityError (no token embedding, no batches, no loss).
    """
    for key, value in (("steps", steps), ("tries", tries), ("candidates", candidates)):
        if not whole(value):
            raise PlanError(f"{key} must be a whole number of at least 1, not {value!r}")
    loss_of = loss or _own_loss
    search = Search(model, tokenizer, list(batches), slot_of(model, name), lambda batch: loss_of(model(**batch)))
    with evaluating(model):
        return search.run([start], steps, tries, candidates)


def slot_of(model: nn.Module, name: str | None) -> Any:
    """The one part that puts vectors before the input."""
    from .adapter import known

    state = state_of(model)
    if name is None and len(state.active) != 1:
        raise AdapterError(f"{len(state.active)} adapters are active", fix="Name one: vn.harden(…, name='mine')")
    name = state.active[0] if name is None else known(state, name)
    parts = [p for p in state.adapters[name].parts if p.acts == "embed"]
    if len(parts) != 1:
        raise PlanError(f"{name!r} has {len(parts)} soft prompts", fix="Attach one, such as vn.PromptTuning(10), and train it")
    if name not in state.active:
        raise AdapterError(f"{name!r} is not active", fix=f"vn.activate(model, {name!r})")
    if not parts[0].site.enter:
        raise CapabilityError("the model has no token embedding before this prompt, so no words to put there", where=parts[0].site.path)
    return parts[0]


@contextmanager
def holding(part: Any, vectors: Tensor) -> Iterator[None]:
    """Within the block the part's prompt is `vectors` (n, d)."""
    part.__dict__["prompt"] = lambda: vectors
    try:
        yield
    finally:
        del part.__dict__["prompt"]


class Search:
    """The measurements that the search is made of. `loss_on` gives the loss of a batch."""

    def __init__(self, model: nn.Module, tokenizer: Any, batches: list[Any], slot: Any, loss_on: Callable[[Any], Tensor]) -> None:
        if not batches:
            raise CapabilityError("no batches to measure prompts on", fix="Give some, with labels, as in training")
        self.tokenizer, self.slot, self.loss_on = tokenizer, slot, loss_on
        self.table = table_of(model, slot)
        device = self.table.device
        self.batches = [moved(b, device) for b in batches]
        words = torch.ones(self.table.shape[0], dtype=torch.bool)
        words[[i for i in tokenizer.all_special_ids if i < len(words)]] = False
        words[len(tokenizer) :] = False  # rows that pad the table
        self.words = words.to(self.table.device)
        self.known: dict[tuple[int, ...], float] = {}

    def run(self, starts: list[str | None], steps: int, tries: int, candidates: int) -> Hardened:
        """The best of the searches from `starts`; None is the nearest tokens."""
        with torch.no_grad():
            soft = self.slot.prompt().detach().to(self.table)
        near = self.nearest(soft)
        nearest = self.tokenizer.decode(near)
        out = Hardened(nearest, [], 0.0, self.mean(soft), (nearest, self.measure(self.ids(nearest) or near)))
        for start in starts:
            ids = self.ids(start) if start is not None else self.ids(nearest) or near
            if not ids:
                raise PlanError(f"start={start!r} has no tokens")
            best, taken = self.measure(ids), []
            for _ in range(steps):
                found = min(((self.measure(c), c) for c in self.exchanges(ids, tries, candidates)), default=(best, ids))
                if found[0] >= best:
                    break
                best, ids = found
                taken.append((self.tokenizer.decode(ids), best))
            if not out.ids or best < out.loss:
                out.text, out.ids, out.loss, out.steps = self.tokenizer.decode(ids), ids, best, taken
        out.tried = len(self.known)
        return out

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def nearest(self, soft: Tensor) -> list[int]:
        """The token nearest to each of the vectors (n, d), by cosine."""
        near = nn.functional.normalize(soft.float(), dim=-1) @ nn.functional.normalize(self.table.float(), dim=-1).t()
        return near.masked_fill(~self.words, float("-inf")).argmax(-1).tolist()

    def exchanges(self, ids: list[int], tries: int, candidates: int) -> Iterator[list[int]]:
        """Prompts that differ from `ids` in one token, the most promising first; all can be typed."""
        e = self.table[ids].clone().requires_grad_(True)
        with torch.enable_grad(), holding(self.slot, e):
            total = sum((self.loss_on(b) for b in self.batches), torch.zeros((), device=e.device)) / len(self.batches)
            (g,) = torch.autograd.grad(total, e)
        gain = (e.detach() * g).sum(-1, keepdim=True) - g @ self.table.t()
        gain = gain.masked_fill(~self.words, float("-inf"))
        gain[torch.arange(len(ids)), ids] = float("-inf")
        best = gain.topk(min(candidates, gain.shape[1]), dim=-1)
        order = best.values.flatten().argsort(descending=True).tolist()
        width, left = best.values.shape[1], tries
        for k in order:
            j, v = k // width, int(best.indices.flatten()[k])
            other = [*ids[:j], v, *ids[j + 1 :]]
            if self.ids(self.tokenizer.decode(other)) == other:
                yield other
                left -= 1
            if not left:
                return

    def measure(self, ids: list[int]) -> float:
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.mean(self.table[ids])
        return self.known[key]

    @torch.no_grad()
    def mean(self, vectors: Tensor) -> float:
        """The mean loss of the batches under a prompt."""
        with holding(self.slot, vectors):
            return sum(float(self.loss_on(b)) for b in self.batches) / len(self.batches)


def table_of(model: nn.Module, slot: Any) -> Tensor:
    """What the token embedding before `slot` gives for each token (V, d), with whatever scale it applies."""
    module = module_at(model, slot.site.enter)
    weight: Any = module._parameters["weight"]
    with torch.no_grad():
        return own_class(module).forward(module, torch.arange(weight.shape[0], device=weight.device)).detach()  # type: ignore[attr-defined]


def _own_loss(out: Any) -> Tensor:
    found = getattr(out, "loss", None)
    if found is None:
        raise CapabilityError("the model gives no loss", fix="Give labels in the batches, or loss=…")
    return found
