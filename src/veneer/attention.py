"""Ways into a model's attention: transformers' attention registry, torch's own function, nn.MultiheadAttention."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import CapabilityError
from .host import Host
from .prefixes import blend

NAME = "veneer"


# -- the registry -----------------------------------------------------------------------------------------------------
class Registry:
    """A module that calls transformers' `AttentionInterface`: it is given its own copy of the configuration, in which
    the implementation is ours; the model's configuration stays as it is, so masks are made as ever."""

    def __init__(self, module: nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention_forward)
        self.config = module.config
        own = copy.copy(module.config)
        own._attn_implementation_internal = NAME  # type: ignore[union-attr]
        module.config = own

    def undo(self, module: nn.Module) -> None:
        module.config = self.config

    def run(self, host: Host, parts: list[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """The attention function of adapted modules: the model's own, with the active prefixes."""
    host: Host = module.__dict__["_veneer_host"]
    own = _implementation(module, host.attention.config)
    position_bias = kwargs.pop("position_bias", None)
    has_bias = "position_bias" in inspect.signature(own).parameters or position_bias is not None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any) -> Any:
        return own(module, q, k, v, mask, **kwargs, **({"position_bias": bias} if has_bias else {}))

    parts = host.kv_now()
    if not parts:
        return attend(query, key, value, attention_mask, position_bias)
    name = host.attention.config._attn_implementation or "eager"
    if "flex" in name or "paged" in name:
        raise CapabilityError(f"prefixes do not work with attn_implementation {name!r}", fix="Use 'sdpa' or 'eager'")
    is_causal = kwargs.get("is_causal")
    attend.scale = kwargs.get("scaling")  # type: ignore[attr-defined]
    attend.causal = name == "sdpa" and (is_causal if is_causal is not None else getattr(module, "is_causal", True))  # type: ignore[attr-defined]
    return blend(host, parts, query, key, value, attention_mask, position_bias, attend, 1)


def _implementation(module: nn.Module, config: Any) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = config._attn_implementation or "eager"
    return eager if name == "eager" and eager is not None else ALL_ATTENTION_FUNCTIONS[name]


# -- torch's own attention function -----------------------------------------------------------------------------------
class _Intercept(TorchFunctionMode):
    def __init__(self, host: Host, parts: list[Any]) -> None:
        super().__init__()
        self.host, self.parts = host, parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return sdpa(func, self.host, self.parts, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def sdpa(
    own: Callable[..., Tensor],
    host: Host,
    parts: list[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """scaled_dot_product_attention with the active prefixes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any) -> Tensor:
        return own(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)

    attend.causal = is_causal  # type: ignore[attr-defined]
    attend.scale = kwargs.get("scale")  # type: ignore[attr-defined]
    return blend(host, parts, query, key, value, attn_mask, None, attend, 2)


class Direct:
    """A module that calls F.scaled_dot_product_attention itself."""

    def undo(self, module: nn.Module) -> None: ...

    def run(self, host: Host, parts: list[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with _Intercept(host, parts):
            return forward(*args, **kwargs)


class _SlowPath(TorchFunctionMode):
    """While any mode is on, nn.MultiheadAttention leaves its fused inference path, which calls no function of ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class MHA:
    """nn.MultiheadAttention: its function looks scaled_dot_product_attention up in torch.nn.functional."""

    def undo(self, module: nn.Module) -> None: ...

    def run(self, host: Host, parts: list[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        own = F.scaled_dot_product_attention
        kwargs = {**kwargs, "need_weights": False}

        def patched(*a: Any, **k: Any) -> Tensor:
            return sdpa(own, host, parts, *a, **k)

        F.scaled_dot_product_attention = patched
        try:
            with _SlowPath():
                return forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = own


VIA: dict[str, Callable[[nn.Module], Any]] = {
    "registry": Registry,
    "sdpa": lambda module: Direct(),
    "mha": lambda module: MHA(),
}


def run_attention(host: Host, parts: list[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return host.attention.run(host, parts, forward, args, kwargs)
