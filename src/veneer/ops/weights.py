"""The matrix of a base's module, whatever it is stored as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..code import own_class
from ..errors import CapabilityError

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


def asked(module: nn.Module, width: int, p: Tensor | None) -> Tensor:
    """W of a linear module from its own answers."""
    starts = range(0, width, ROWS)
    return torch.cat([answers(module, torch.eye(min(ROWS, width - i), width, dtype=torch.float32).roll(i, 1), p).t() for i in starts]).t()


def answers(module: nn.Module, rows: Tensor, p: Tensor | None) -> Tensor:
    """W rowsᵀ (out x n) for rows (n x in): f(rows) - f(0) of a linear module, whatever its weight `p` is stored as."""
    forward = own_class(module).forward  # without what is attached to it
    tensors = [t for t in (p, *module.parameters(recurse=False), *module.buffers(recurse=False)) if t is not None]
    device = tensors[0].device if tensors else torch.device("cpu")
    bias = getattr(module, "bias", None)
    dtype = bias.dtype if isinstance(bias, Tensor) and bias.is_floating_point() else getattr(module, "compute_dtype", None) or torch.float32
    rows = rows.to(device, dtype)
    return (forward(module, rows) - forward(module, torch.zeros_like(rows[:1]))).t()
