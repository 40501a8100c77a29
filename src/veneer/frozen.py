"""The frozen base's own products in another arithmetic: what vn.optimize(base_compute=...) puts below the hosts.

A host calls the module's original forward; here that forward itself is exchanged, one class further down, so that whatever
is attached (or nothing) stands above it unchanged. Taken are the maps of the repeated layers whose weight is frozen, an
ordinary parameter, and read by their own call alone.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .calls import autocasting
from .code import own_class
from .errors import CapabilityError, ConfigError, did_you_mean
from .install import exchange, host_of
from .ops import fp8
from .resolve import sites
from .shells import ProductMixin

if TYPE_CHECKING:
    from .host import Host
    from .state import State

KINDS = ("linear", "transposed")  # y = W x + b, as one product


class Product:
    """W in the arithmetic of the base, and how to tell that the module's weight is another one by now."""

    def __init__(self, module: nn.Module, w: Tensor) -> None:
        self.weight = fp8.quantised(w)
        self.stamp = stamp(module)
        self.away = False  # the module's own weight is in CPU memory

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if autocasting(x) else None
        return fp8.linear(x, self.weight, bias, dtype)


def stamp(module: Any) -> tuple[int, int]:
    w = module._parameters["weight"]
    return w.data_ptr(), w._version


class FrozenBase:
    """All products of one model. `renew` makes them fit what is attached, merged and trainable now; `remove` takes them off.

    With `offload` the original weights are moved to CPU memory meanwhile, but those that a part in place reads.
    """

    def __init__(self, model: nn.Module, state: State, offload: bool) -> None:
        self.model, self.state = model, state
        self.sites = [s for s in sites(model) if s.port == "weight" and s.layer is not None and s.kind in KINDS and s.role != "router" and not s.enter]
        self.made: list[str] = []  # hosts that nothing else needed
        self.resting: list[tuple[nn.Parameter, torch.device]] = []
        if not self.renew(offload):
            raise CapabilityError("no layer has a frozen linear map that could be computed in fp8", fix="Leave base_compute out")

    def renew(self, offload: bool = False) -> int:
        """Make, keep or drop the product of every module; return how many there are."""
        count, users = 0, self._users() if offload else {}
        for site in {s.path: s for s in self.sites}.values():
            path, module = site.path, self.model.get_submodule(site.path)
            host = self.state.hosts.get(path)
            if not eligible(module, host):
                module.__dict__.pop("_veneer_product", None)
                continue
            w: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
            capable(w.device, path)
            if host is None:
                host = host_of(self.model, self.state, path)
                self.made.append(path)
            if ProductMixin not in host.mixins:
                exchange(self.model, self.state, path, {ProductMixin})
            p = module.__dict__.get("_veneer_product")
            if p is None or p.stamp != stamp(module):
                p = module.__dict__["_veneer_product"] = Product(module, w if site.kind == "linear" else w.t())
            # a weight that others use too, or that a part at it reads, stays
            if offload and w.device.type != "cpu" and users[id(w)] == 1 and not any(part.reads_weight() for part in host.parts):
                self.resting.append((w, w.device))
                if not w.is_meta:
                    w.data = w.data.cpu()
                p.stamp, p.away = stamp(module), True
                self.state.resting = True
            count += 1
        return count

    def _users(self) -> Counter[int]:
        return Counter(id(w) for m in self.model.modules() for w in m._parameters.values())

    def remove(self) -> None:
        for w, device in self.resting:
            w.data = w.data.to(device)
        self.resting, self.state.resting = [], False
        for path in dict.fromkeys(s.path for s in self.sites):
            module, host = self.model.get_submodule(path), self.state.hosts.get(path)
            module.__dict__.pop("_veneer_product", None)
            if host is None or ProductMixin not in host.mixins or "_veneer_host" not in module.__dict__:  # or all is detached
                continue
            host.mixins.discard(ProductMixin)
            if host.mixins or path not in self.made:
                exchange(self.model, self.state, path, set())
            else:
                module.__dict__.pop("_veneer_host")
                module.__class__ = host.original
                del self.state.hosts[path]


def eligible(module: nn.Module, host: Host | None) -> bool:
    """Whether the module's call is y = W x + b with an ordinary frozen W that no part replaces, of a size that fits."""
    w = module._parameters.get("weight")
    if w is None or type(w) is not nn.Parameter or w.dim() != 2 or w.requires_grad or w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(s % fp8.MULTIPLE for s in w.shape) or own_class(module).forward not in (nn.Linear.forward, Conv1D.forward):
        return False
    return "forward" not in module.__dict__ and (host is None or not host.owned.get("weight"))


def capable(device: torch.device, path: str) -> None:
    """Raise CapabilityError where `device` has no fp8 products. A CPU emulates them, in fp32."""
    if device.type in ("cpu", "meta"):
        return
    has = device.type == "cuda" and torch.version.hip is None
    if not has or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise CapabilityError(
            f"{name} has no fp8 matrix products",
            where=path,
            fix="fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper); leave base_compute out",
        )


COMPUTE = {"fp8": FrozenBase}


def frozen_base(model: nn.Module, state: State, kind: str, offload: bool) -> FrozenBase:
    """Raises: ConfigError for an unknown kind; CapabilityError where the device or the model has nothing for it."""
    if kind not in COMPUTE:
        raise ConfigError(f"base_compute={kind!r} is no arithmetic of the base", fix=did_you_mean(str(kind), COMPUTE))
    return COMPUTE[kind](model, state, offload)
