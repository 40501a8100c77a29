"""The matrix of a base's module, whatever it is stored as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..code import own_class
from ..errors import CapabilityError
from .fresh import fresh

if TYPE_CHECKING:
    from ..sites import Site
    from .maps import Map

ROWS = 1024  # of the identity that a packed module is asked about at a time


def weight_of(module: Any, site: Site, m: Map) -> Tensor:
    """The canonical W (out x in) of `module` at `site`, without a gradient.

    A module whose stored weight is packed is asked what it computes: column i of W is f(e_i) - f(0). So no quantiser
    needs a case of its own. Raises: CapabilityError where that does not work either.
    """
    p = module._parameters.get(site.tensor or "weight")
    if p is not None and p.is_floating_point() and plain(p, site):
        return m.canonical(p.detach())
    if not isinstance(module, nn.Module) or site.kind != "linear":
        raise CapabilityError("the base's weight cannot be had here", where=site.path, fix="Load the base unquantised")
    with torch.no_grad():
        return m.canonical(asked(module, site.inp, p))


def plain(p: Tensor, site: Site) -> bool:
    """Whether a stored weight has the size that the site says, and is an ordinary tensor: not packed by a quantiser."""
    if type(p.data) is not Tensor:
        return False
    return site.slice is not None or p.numel() == site.out * site.inp * max(1, site.experts)


def derivable(module: nn.Module, width: int, p: Tensor | None) -> bool:
    """Whether a gradient passes through the module: some quantisers' kernels have no derivative, and some drop the graph."""
    with torch.enable_grad():
        x = torch.zeros(1, width, **_entry(module, p), requires_grad=True)
        try:
            y = own_class(module).forward(module, x)  # type: ignore[attr-defined]
            return y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None
        except (RuntimeError, NotImplementedError):
            return False


class Passed(torch.autograd.Function):
    """y = f(x) of a linear module, as it computes it, with the derivative that it has not: dx = Wᵀ dy, W asked for again in
    each backward pass, ROWS columns at a time, so that no whole W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.width, ctx.dtype = module, x.shape[-1], x.dtype
        return fresh(own_class(module).forward(module, x))  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        module, width = ctx.module, ctx.width
        p = module._parameters.get("weight")
        columns = (answers(module, _unit(i, width), p) for i in range(0, width, ROWS))
        return torch.cat([dy.to(w.dtype) @ w for w in columns], -1).to(ctx.dtype), None


def asked(module: nn.Module, width: int, p: Tensor | None) -> Tensor:
    """W of a linear module from its own answers."""
    return torch.cat([answers(module, _unit(i, width), p).t() for i in range(0, width, ROWS)]).t()


def _unit(i: int, width: int) -> Tensor:
    """Rows i to i + ROWS of the identity."""
    return torch.eye(min(ROWS, width - i), width, dtype=torch.float32).roll(i, 1)


def _entry(module: nn.Module, p: Tensor | None) -> dict[str, Any]:
    """The device and dtype that a module computes in, whatever its weight `p` is stored as."""
    tensors = [t for t in (p, *module.parameters(recurse=False), *module.buffers(recurse=False)) if t is not None]
    floats = [t.dtype for t in (getattr(module, "bias", None), *tensors) if isinstance(t, Tensor) and t.is_floating_point()]
    return {
        "device": tensors[0].device if tensors else torch.device("cpu"),
        "dtype": getattr(module, "compute_dtype", None) or next(iter(floats), torch.float32),
    }


def answers(module: nn.Module, rows: Tensor, p: Tensor | None) -> Tensor:
    """W rowsᵀ (out x n) for rows (n x in): f(rows) - f(0) of a linear module, whatever its weight `p` is stored as."""
    forward = own_class(module).forward  # type: ignore[attr-defined]  # without what is attached to it
    rows = rows.to(**_entry(module, p))
    with torch.no_grad():
        return (forward(module, rows) - forward(module, torch.zeros_like(rows[:1]))).t()
