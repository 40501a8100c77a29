"""Large products in fp32 on a CPU. torch asks MKL for them; oneDNN, which comes with torch too, is faster where MKL's kernels are not made
for the processor: on an AMD EPYC with AVX-512 by 8 to 15%, from some millions of multiplications on.

    linear(x, w, c)   x wᵀ + c      (N, K), (O, K), (O,)    ->  (N, O)
    add_(y, x, w)     y += x wᵀ     (N, O), (N, K), (O, K)

Only what no gradient is taken of: inside an autograd function, or without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLICATIONS = 1 << 22  # below, oneDNN takes longer to begin than it saves

_own: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_PLAIN = (Tensor, torch.nn.Parameter)


def _fits(x: Tensor, w: Tensor) -> bool:
    return (
        _own is not None
        and x.is_cpu
        and x.dtype == w.dtype == torch.float32
        and x.shape[0] * w.numel() >= MULTIPLICATIONS
        and type(x) in _PLAIN
        and type(w) in _PLAIN
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # a mode that counts or records knows torch's own products alone
        and bool(torch.backends.mkldnn.enabled)
    )


def linear(x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    return _own(x, w, c, "none", [], "") if _fits(x, w) else F.linear(x, w, c)


def add_(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return y.add_(linear(x, w)) if _fits(x, w) else y.addmm_(x, w.t())
