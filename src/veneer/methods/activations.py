"""The activation functions that methods with an MLP of their own offer, by name."""

from __future__ import annotations

import torch
from torch import nn

ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "swish": nn.functional.silu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": nn.functional.leaky_relu,
    "identity": lambda x: x,
}
