"""What a matrix becomes in few bits, simulated in plain torch: quantised and at once dequantised."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 64  # numbers that share one scale: the default of QLoRA and bitsandbytes


@functools.cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of NormalFloat4 (Dettmers et al. 2023, arXiv 2305.14314): quantiles of N(0, 1), zero among them, over
    the largest; 8 levels below zero, 7 above it mirrored from theirs, and ends at 0.9677083."""
    end = 0.9677083
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return tuple((levels / levels.max()).tolist())


def nf4(w: Tensor) -> Tensor:
    """Each number to the nearest level times the largest magnitude of its block of 64, blocks row by row."""
    levels = torch.tensor(nf4_levels(), device=w.device, dtype=w.dtype)
    blocks, top = _blocks(w)
    codes = torch.bucketize(blocks / top, (levels[1:] + levels[:-1]) / 2)
    return _unblock(levels[codes] * top, w)


def int4(w: Tensor) -> Tensor:
    """Round to 15 even steps, -7 to 7, of a block's largest magnitude."""
    blocks, top = _blocks(w)
    return _unblock((blocks / top * 7).round() * top / 7, w)


def int8(w: Tensor) -> Tensor:
    """Round to 255 even steps of a row's largest magnitude: LLM.int8's weights (arXiv 2208.07339)."""
    top = w.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (w / top * 127).round() * top / 127


def _blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    flat = w.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    return blocks, blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)


def _unblock(blocks: Tensor, w: Tensor) -> Tensor:
    return blocks.reshape(-1)[: w.numel()].reshape(w.shape)


ROUNDINGS = {"nf4": nf4, "int4": int4, "int8": int8}
