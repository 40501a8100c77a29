"""Parts: what a method leaves at one site. Each class below is one way of acting; a method subclasses one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.maps import Map, map_of
from ..ops.weights import weight_of
from ..sites import Site

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
    params = [p for p in module.parameters() if p.is_floating_point()] or [p for p in build.model.parameters() if p.is_floating_point()]
    device = torch.device("meta") if build.blank else params[0].device if params else torch.device("cpu")
    base = params[0].dtype if params else torch.float32
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
    reads_state: bool = False  # its own input, and so its gate's, is the state h that leaves the block, and not x
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

    def scale_by(self, c: float) -> bool:
        """Fold the constant `c` into the parameters, so that the deviation is c times what it was. False: cannot."""
        return False


class Bank(Part):
    """What the parts of one method share (random projections, a bank of vectors): registered once, at the model itself.

    It acts nowhere. The parts that use it keep a plain reference, as `part.bank`. Yielded before them, by Method.parts.
    """

    def __init__(self, port: str = "weight") -> None:
        super().__init__(Site("", port))


class OutputPart(Part):
    """Adds `deviation(x, h)` to the output h of a map or a block whose input is x."""

    acts = "output"

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


class MapPart(OutputPart):
    """An `OutputPart` at the weight port: `self.map` applies matrices as the base's module would."""

    def __init__(self, site: Site, build: Build) -> None:
        super().__init__(site)
        self.map: Map = map_of(site, build.module)
        self.__dict__["module"] = build.module  # whose matrix it is: see `weight`
        if self.map.read_by_others:
            self.acts = "tensor"  # type: ignore[misc]

    def weight(self) -> Tensor:
        """The base's own canonical W (out x in, restricted to the slice), without a gradient; dequantised if need be.

        Raises: CapabilityError where the module has no matrix to be had.
        """
        return weight_of(self.module, self.site, self.map)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(dW, db) for the map's matrix w, out x in (experts: E x out x in), and bias b, in their own dtype."""
        raise NotImplementedError

    def reads_weight(self) -> bool:
        return getattr(self, "factors", None) is None

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        """dW^T x at a module whose map `m` applies the transpose of this part's own W, as an embedding does of its tied
        head's; h is what it returned so far.

        By the part's factors where it has some: (B A)^T = A^T B^T. Otherwise the whole dW is made.
        """
        factors = getattr(self, "factors", None)
        if factors is None:
            return m.apply(x, self.fold(self.weight().to(h.dtype), None)[0].t().to(h.dtype))
        a, b, s = factors(h)
        z = m.down(x, b.t())
        return m.up(z * s if s != 1 else z, a.t())

    def value(self, p: Tensor) -> Tensor:
        """p + dW, where the model reads the weight itself and no call of the map can be met; its bias stays."""
        return p + self.map.stored(self.fold(self.map.canonical(p), None)[0].to(p.dtype), p)


class DeltaPart(MapPart):
    """A `MapPart` that adds a matrix: y = (W + dW) x + b. The subclass gives `delta`, canonical, in its own dtype."""

    def delta(self) -> Tensor:
        raise NotImplementedError

    def deviation(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map.apply(x, self.cast(self.delta(), h))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.delta().to(w.dtype), None

    def reads_weight(self) -> bool:
        return False

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        return m.apply(x, self.cast(self.delta(), h).t())


class InputPart(MapPart):
    """Adds `inward(x)` to the input of a map."""

    acts = "input"

    def inward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def across(self, m: Map, x: Tensor, h: Tensor) -> Tensor:
        if not m.looked_up:
            return super().across(m, x, h)
        # what changes the input does the same to every row of W, so only the rows that are looked up are changed
        rows = m.looked(x, self.weight().to(h.dtype))
        return self.fold(rows.flatten(0, -2), None)[0].to(h.dtype).unflatten(0, x.shape)


class TensorPart(Part):
    """Gives the tensor that takes the place of the base's tensor p while the owner's module runs."""

    acts = "tensor"

    def value(self, p: Tensor) -> Tensor:
        raise NotImplementedError


class KVPart(Part):
    """Keys and values that attention sees before its own."""

    acts = "kv"
    apart: bool = False  # through a softmax of their own, scaled by strength()

    def strength(self) -> Tensor:
        """What an `apart` part's attention is multiplied by: (heads of the queries,) or (1,)."""
        raise NotImplementedError

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """K and V, each (heads, n, head_dim)."""
        raise NotImplementedError


class EmbedPart(Part):
    """Vectors put before the embedded input sequence."""

    acts = "embed"
    keep: int = 0

    def prompt(self) -> Tensor:
        """(n, d)."""
        raise NotImplementedError
