"""What a training loop asks of the active adapters: parameter groups, a term of the loss, a call after each step.

All three do nothing for methods that need nothing, so a loop may always use them:

    optimiser = vn.adamw(model, lr=1e-4)
    for step, batch in enumerate(batches):
        (model(**batch).loss + vn.penalty(model)).backward()
        optimiser.step()
        vn.advance(model, step + 1, total)
        optimiser.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import known
from .attach import state_of
from .errors import AdapterError
from .plan import finite


def parts_in_use(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[Any]:
    """The parts of the active adapters, or of those named."""
    state = state_of(model)
    for name in state.active if names is None else names:
        yield from state.adapters[known(state, name)].parts


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: what is trainable (of the adapters `names` alone, where given), by learning rate.

    A method may train some of its parameters at a multiple of `lr`, as LoRA+ does B, and a plan some of its methods
    (vn.paced). One-dimensional parameters (vectors, biases, norms) get no weight decay, as is usual.
    Raises: AdapterError where nothing is trainable, or lr is no number.
    """
    if not finite(lr) or lr < 0:
        raise AdapterError(f"lr={lr!r} is not a learning rate", fix="For example lr=1e-4")
    faster: dict[int, float] = {}
    if "_veneer_state" in model.__dict__:
        for record in state_of(model).adapters.values():
            for part in record.parts:
                for key, p in part.named_parameters():
                    faster[id(p)] = part.gate.rate if key.startswith("gate.") else part.pace * part.rates.get(key, 1.0)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    mine = None if names is None else {id(p) for part in parts_in_use(model, names) for p in part.parameters()}
    for p in model.parameters():
        if p.requires_grad and (mine is None or id(p) in mine):
            groups.setdefault((faster.get(id(p), 1.0), weight_decay if p.dim() > 1 else 0.0), []).append(p)
    if not groups:
        raise AdapterError("nothing here is trainable", fix="Attach a plan first: vn.attach(model, plan, name='mine')")
    return [{"params": ps, "lr": lr * rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def penalty(model: nn.Module, names: Iterable[str] | None = None) -> Tensor:
    """The sum of what the active adapters (or those named) add to the training loss (AdaLoRA's orthogonality, a mixture's
    balance); a zero where they add nothing. Call it after the model and before the backward pass.

    Raises: AdapterError for unknown names, or where nothing is attached.
    """
    own = [source for part in parts_in_use(model, names) for source in (part, part.gate) if source is not None]
    terms = [t for source in own if (t := source.penalty()) is not None]
    if not terms:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([t.to(terms[0].device) for t in terms]).sum()


def advance(model: nn.Module, step: int, total: int, optimiser: Any = None, *, names: Iterable[str] | None = None) -> None:
    """Tell the active adapters (or those named) that optimiser step `step` of `total` (counted from 1) is done; gradients
    must still be there. Methods that change while they train (AdaLoRA's budget, a lottery ticket's rewind) act on it.

    optimiser  needed by methods that exchange their parameters for others: those that are gone leave it with their state,
               and the new ones take their places

    Raises: AdapterError for unknown names, for a step that is not within 1 to total, and where an optimiser is needed and
    not given.
    """
    if not 1 <= step <= total:
        raise AdapterError(f"step {step} of {total}", fix="Steps count from 1 to the total")
    state = state_of(model)
    for name in state.active if names is None else names:
        record = state.adapters[known(state, name)]
        for i, term in enumerate(record.plan.terms()):
            parts = [p for p in record.parts if p.term == i]
            if not term.method.renews(step, total):
                term.method.advance(parts, step, total)
                continue
            if optimiser is None:
                raise AdapterError(f"{term.method.name} exchanges its parameters now", fix="Give the optimiser: vn.advance(model, step, total, optimiser)")
            if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise AdapterError(f"{term.method.name} exchanges its parameters, which DDP and FSDP2 do not see", fix="Train it in one process")
            before = {id(p) for part in parts for p in part.parameters()}
            term.method.advance(parts, step, total)
            exchange(getattr(optimiser, "optimizer", optimiser), before, [p for part in parts for p in part.parameters()])


def exchange(optimiser: Any, before: set[int], now: list[nn.Parameter]) -> None:
    """Take the parameters `before` that are not in `now` out of the optimiser, with their state, and put what is new in `now`
    into the group that lost most."""
    kept, lost = {id(p) for p in now}, []
    for group in optimiser.param_groups:
        gone = {id(p) for p in group["params"] if id(p) in before and id(p) not in kept}
        for p in group["params"]:
            if id(p) in gone:
                optimiser.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
        lost.append(len(gone))
    new = [p for p in now if id(p) not in before and p.requires_grad]
    optimiser.param_groups[max(range(len(lost)), key=lost.__getitem__)]["params"] += new
