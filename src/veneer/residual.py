"""Where the residual stream passes a model's blocks: read off one call of the model, from its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import resolve
from .calls import call, evaluating
from .errors import CapabilityError, ConfigError
from .example import example
from .methods.part import module_at
from .sites import Site
from .tensors import first_of


@dataclass(frozen=True)
class Stream:
    """The residual r that a block's state h is added to: the first input of the module `enter`. `norm` is the module that
    takes h + r, where it is a norm (post-norm models); '' elsewhere."""

    enter: str
    norm: str


def streams(model: nn.Module, sites: Iterable[Site]) -> dict[Site, Stream]:
    """The stream at each of `sites`, hidden ones of blocks.

    The model is called once, as it is without adapters, on example inputs. A norm
    that takes h + x, with x what entered the block, follows the addition; or else a norm whose output is x went before
    the block, and its input is r.

    Raises: CapabilityError for a model whose inputs are not known, or without numbers, or whose blocks are neither.
    """
    sites = list(sites)
    norms = {s.path for s in resolve.sites(model) if s.port == "param" and s.role == "norm"}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, y = first_of(args, kwargs), output if isinstance(output, Tensor) else output[0]
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                seen[path] = x, y

        return hook

    try:
        inputs = example(model)
    except (ConfigError, AttributeError) as e:  # no model of transformers, or inputs that are not known
        raise _lost(model, str(e)) from e
    if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    state = model.__dict__.get("_veneer_state")
    enabled = state is not None and state.enabled
    paths = norms | {p for s in sites for p in (s.path, s.enter)}
    hooks = [module_at(model, p).register_forward_hook(note(p), with_kwargs=True) for p in paths]
    try:
        if state is not None:
            state.enabled = False
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
        raise _lost(model, str(e).partition("\n")[0]) from e
    finally:
        if state is not None:
            state.enabled = enabled
        for h in hooks:
            h.remove()
    out = {}
    for s in sites:
        if s.role == "layer" or s.path not in seen or s.enter not in seen:
            raise _lost(model, f"{s.path!r} is no block whose state is added to the stream")
        h, x = seen[s.path][1], seen[s.enter][0]
        after = next((n for n in norms if n in seen and _same(seen[n][0], h, x)), None)
        before = next((n for n in norms if n in seen and seen[n][1].shape == x.shape and torch.equal(seen[n][1], x)), None)
        if after is None and before is None:
            raise _lost(model, f"no norm is seen before or behind {s.path!r}")
        out[s] = Stream(s.enter if after is not None else str(before), after or "")
    for s, stream in out.items():  # a first layer without a norm of its own looks like the other sort
        odd = next((o for o in out if (o.tower, o.role) == (s.tower, s.role) and bool(out[o].norm) != bool(stream.norm)), None)
        if odd is not None:
            raise _lost(model, f"norms stand before one of {s.path!r} and {odd.path!r}, and behind the other")
    return out


def _same(total: Tensor, h: Tensor, x: Tensor) -> bool:
    return total.shape == h.shape == x.shape and not total.is_meta and torch.allclose(total, h + x, rtol=1e-3, atol=1e-5)


def _lost(model: nn.Module, why: str) -> CapabilityError:
    return CapabilityError(
        f"where the residual stream passes the blocks of {type(model).__name__} is not known: {why}",
        fix="Use residual=False: f then reads the block's own state",
    )
