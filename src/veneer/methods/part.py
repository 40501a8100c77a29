"""A part: what a method leaves at one site. The ways in which it may act are in parts.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..sites import Site
from ..structure import base_parameters

if TYPE_CHECKING:
    from ..compose.gate import Gate
    from .base import Build


def module_at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def like(build: Build, site: Site) -> dict[str, Any]:
    """Device and dtype for new parameters at `site`: its module's device; fp32 where the base is in half precision.

    Half-precision bases get fp32 master parameters, cast to the activations' dtype at use: the cast is as small as the
    part, while casting the activations up would cost memory at every layer.
    """
    module = module_at(build.model, site.path)
    own = (p for owner in (module, build.model) for _, p in base_parameters(owner) if p.is_floating_point())
    first = next(own, None)
    device = torch.device("meta") if build.blank else first.device if first is not None else torch.device("cpu")
    base = first.dtype if first is not None else torch.float32
    dtype = build.dtype or (base if base == torch.float64 else torch.float32)
    return {"device": device, "dtype": dtype}


class Part(nn.Module):
    """The trainable tensors of one method at one site, with the rule that uses them.

    `gate` is None or a `Gate`; `published` asks a kv part for the paper's way of gating.
    """

    acts: ClassVar[str] = ""
    replaces: ClassVar[bool] = False
    rates: ClassVar[dict[str, float]] = {}  # learning rates of some of its parameters, as multiples of the run's
    places: Callable[..., Tensor] | None = None  # which tokens it acts on, where not on all: see ops/positions.py
    taps: tuple[str, ...] = ()  # modules whose inputs it reads besides its own: found in seen[i].x, without a gradient
    reads_state: bool = False  # its own input is the state h that leaves the block, and not x
    enter: str = ""  # the module whose input x is, where it is not the site's
    gate: Gate | None
    cell: Any
    owner: Any
    echoes: list[Any]
    seen: Any
    bank: Any

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.gate = None
        self.method_name = ""
        self.stage = 0  # along >>
        self.term = 0  # which of the plan's methods
        self.adapter = ""
        self.published = False
        self.held = False
        self.pace = 1.0  # learning rate of its tensors as a multiple of the run's (vn.paced)
        self.tied = True  # it acts at every module that holds its tensor
        self.visible = False  # a prompt that its tower's output keeps
        # plain references, not submodules: the cell that brings the block's input, and the host that owns the tensor
        self.__dict__["cell"] = None
        self.__dict__["owner"] = None
        self.__dict__["seen"] = []
        self.__dict__["bank"] = None  # what it shares with other parts of its method
        self.__dict__["echoes"] = []  # what it does at other modules that hold its tensor (see ties.py)

    def frozen(self, name: str, value: Tensor | None) -> None:
        """Keep `value` as `self.<name>`: saved with the adapter, and never trained."""
        self.register_buffer(name, value)

    def freeze(self) -> None:
        """Train no tensor of this part; its gate's go on."""
        self.held = True
        for key, p in self.named_parameters():
            if not key.startswith("gate."):
                p.requires_grad_(False)

    def tensors(self, fold: bool) -> dict[str, Tensor]:
        """What is saved of this part, by name. With `fold`, what it folds away (a prefix's MLP) is replaced by its result."""
        own = dict(self.state_dict(keep_vars=True))
        folded: dict[str, Tensor] = self.folded() if fold and hasattr(self, "folded") else {}
        return {**folded, **{k: v for k, v in own.items() if k.startswith("gate.")}} if folded else own

    def penalty(self) -> Tensor | None:
        """A term of the training loss, where the method has one: see vn.penalty."""
        return None

    def sees(self, x: Tensor, h: Tensor) -> Tensor:
        """Its own input, and so its gate's."""
        return h if self.reads_state else x

    def idle(self) -> bool:
        """Whether it leaves the state as it is in this call, and need not be computed (AdapterDrop)."""
        return False

    def cast(self, p: Tensor, x: Tensor) -> Tensor:
        """`p` in the dtype that `x` is computed in."""
        return p if p.dtype == x.dtype else p.to(x.dtype)

    def reads_weight(self) -> bool:
        """Whether dW depends on W."""
        return False

    def flaw(self) -> str:
        """What is wrong with tensors that a file gave, beyond their shapes; '' where nothing is."""
        return ""

    def derive(self) -> None:
        """Make what follows from the base and from saved tensors, and is not saved itself; called once those are given."""

    def scale_by(self, c: float) -> bool:
        """Fold the constant `c` into the parameters, so that the deviation is c times what it was. False: cannot."""
        return False


class Bank(Part):
    """What the parts of one method share (random projections, a bank of vectors): registered once, at the model itself.

    It acts nowhere. The parts that use it keep a plain reference, as `part.bank`. Yielded before them, by Method.parts.
    """

    def __init__(self, port: str = "weight") -> None:
        super().__init__(Site("", port))
