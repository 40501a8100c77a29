"""What a method is: a frozen dataclass that says where it acts, and a `Part` for each site that says how.

A method never sees the model's family, a quantiser or the trainer. It is given a `Site` and a `Build` and returns a
`Part`, an `nn.Module` with the trainable tensors of that site and one rule. Which rule it has decides its port:

    inward(x)        -> dx   added to the input of a map        (weight port)
    deviation(x, h)  -> dh   added to the output of a map, or to the hidden state that leaves a block (weight, hidden)
    fold(W, b)       -> dW, db  the same deviation in the map's own matrix, out x in (weight; for merging, and wherever
                         the model reads the tensor itself)
    value(p)         -> p'   what the base's tensor p is replaced by  (param)
    keys_values()    -> K, V each (heads, n, head_dim)           (kv)
    prompt()         -> (n, d)                                    (embed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import CapabilityError, PlanError, did_you_mean
from ..plan import Plan, short
from ..sites import Site
from .checks import Checked

if TYPE_CHECKING:
    import torch

    from ..probe import Probe
    from .part import Part


@dataclass
class Build:
    """What a method may know when it makes its parts: the model (read only), and whether a gate will scale it.

    `blank` parts have shapes (on the meta device) and no numbers: a file will give those, once their shapes fit.
    """

    model: Any
    gated: bool = False
    dtype: torch.dtype | None = None
    tokenizer: Any = None
    blank: bool = False
    module: Any = None
    probe: Probe | None = None

    def data(self, who: str) -> Probe:
        """What measures the base on the data given to vn.attach. Raises: PlanError where none was given."""
        if self.probe is None:
            raise PlanError(f"{who} looks at data", fix="Give some: vn.attach(model, plan, batches=batches), as in training")
        return self.probe


class Method(Checked, Plan):
    """Base of every method. Subclasses are frozen dataclasses; their fields are the hyper-parameters.

    Class attributes declare what the method is and can do; asking for more is a `CapabilityError`.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    ports: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = True
    routable: ClassVar[bool] = True
    gateable: ClassVar[bool] = True
    tied: ClassVar[bool] = True  # a tensor that several modules hold is changed once, for all of them
    holds: ClassVar[str] = ""  # of which form it can take any numbers on: a 'tensor', whole, or a product of 'factors'
    needs_data: ClassVar[bool] = False  # vn.attach must be given batches
    rate: ClassVar[tuple[float, str]] = (5e-4, "LoRA's, for a method without a rate of its own")  # with AdamW, and whence
    leads: ClassVar[bool] = True  # whether its rate counts beside other methods'
    default_at: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ()  # of maps that it can change (see Site); () is all

    at: str | None

    def parts(self, sites: Callable[..., list[Site]], build: Build) -> Iterator[tuple[Site, Part]]:
        """Yield (site, part) for every site that the method takes. `sites(pattern, port)` chooses among the model's."""
        from .part import module_at

        for port in self.ports:
            for site in sites(self.at, port, self.default_at):
                build.module = module_at(build.model, site.path)
                yield site, self.part(site, build)

    def part(self, site: Site, build: Build) -> Part:
        raise NotImplementedError

    def advance(self, parts: list[Part], step: int, total: int) -> None:
        """Called after every optimiser step, gradients still at hand, with the parts that this method made: for
        methods whose shape or mask changes while they train. Default: nothing."""

    def renews(self, step: int, total: int) -> bool:
        """Whether `advance` will exchange trained parameters for others at this step, so that it needs the optimiser."""
        return False

    @property
    def steady(self) -> bool:
        """Whether every training step does the same operations, so that one recording stands for all."""
        # prompts work out their rows' lengths on the host
        return type(self).advance is Method.advance and "embed" not in self.ports

    def default_rate(self) -> tuple[float, str]:
        """The learning rate with AdamW where none is given, and its source; where it hangs on the hyper-parameters, a
        method says more than `rate`."""
        return self.rate

    def leaves(self) -> Iterator[Method]:
        yield self

    def ungated(self) -> Method:
        """The method that acts without a gate as this one does under it (before the gate's scale)."""
        return self

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"method": self.name}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value != f.default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_fields(cls, given: dict[str, Any], where: str) -> Method:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in given:
            if key not in known:
                raise PlanError(f"{cls.name} has no option {short(key)}", where=where, fix=did_you_mean(str(key), known))
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        except PlanError as e:
            raise PlanError(e.what, where=where, fix=e.fix) from None
        except TypeError as e:
            raise PlanError(f"{cls.name}: {e}", where=where, fix=f"Its options: {', '.join(known)}") from None

    def __str__(self) -> str:
        own = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in own)})"


def need(condition: bool, what: str, fix: str = "") -> None:
    """Raise `CapabilityError` unless `condition`."""
    if not condition:
        raise CapabilityError(what, fix=fix)
