"""What a torch.autograd.Function may return while a compiler traces it."""

import torch
from torch import Tensor


def fresh(y: Tensor) -> Tensor:
    """y as the result of an operation of its own. torch 2.11's tracer takes a result that was written in place, or is another name
    of an earlier one, for one without a gradient, and lets zeros flow back without a word. A compiler drops the copy."""
    return y.clone() if torch.compiler.is_compiling() else y
