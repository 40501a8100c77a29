"""What methods take from a matrix."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def svd(w: Tensor, k: int, niter: int | None, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k) and V (k, in) of w: exact, or by `niter` iterations of the randomised method (Halko et al.), which
    draws from `seed` where one is given, and leaves torch's own generators alone then."""
    if niter is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        with contextlib.ExitStack() as stack:
            if seed is not None:
                stack.enter_context(torch.random.fork_rng([w.device] if w.device.type != "cpu" else [], device_type=w.device.type))
                torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, q=k, niter=niter)
        v = v.mT
    return u[..., :k], s[..., :k], v[..., :k, :]


def wide(w: Tensor) -> Tensor:
    """In fp32 at least: decompositions need it."""
    return w.to(torch.promote_types(w.dtype, torch.float32))
