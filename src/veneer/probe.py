"""Probing: what the base does on some data, for methods whose start or mask depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import call, evaluating
from .errors import CapabilityError

if TYPE_CHECKING:
    from .sites import Site

OVER = 8  # directions kept beyond those asked for, so that the last ones are right too


def loss_of(output: Any) -> Tensor:
    """The loss that a model returned. Raises: CapabilityError where it returned none."""
    value = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if value is None:
        raise CapabilityError("the model returned no loss for these batches", fix="Give labels in them, or loss=function of the model's output")
    return value


class Probe:
    """Runs the base, without adapters and dropout, on `batches`. The model is left as it was; nothing is trained."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor] | None = None) -> None:
        self.model, self.loss = model, loss or loss_of
        self.batches = list(batches)
        if not self.batches:
            raise CapabilityError("there are no batches to look at", fix="Give some as in training: batches=[{'input_ids': …, 'labels': …}, …]")

    def gradients(self, sites: list[Site]) -> list[Tensor]:
        """The gradient of the mean loss over the batches by each site's whole tensor, in fp32.

        Raises: CapabilityError where a tensor has none (quantised).
        """
        return self._collect(sites, self.batches, lambda g: g, len(self.batches))

    def squares(self, sites: list[Site]) -> list[Tensor]:
        """The empirical Fisher information of each site's whole tensor: the mean over examples of the squared gradient
        of one example's loss, in fp32. Raises: as `gradients`."""
        rows = [row for batch in self.batches for row in _rows(batch)]
        return self._collect(sites, rows, lambda g: g * g, len(rows))

    def _collect(self, sites: list[Site], batches: list[Any], of: Callable[[Tensor], Tensor], count: int) -> list[Tensor]:
        params = [self._parameter(s) for s in sites]
        unique = {id(p): p for p in params}
        totals = {i: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for i, p in unique.items()}
        with self._base(), self._only(list(unique.values())):
            for batch in batches:
                grads = torch.autograd.grad(self.loss(call(self.model, batch)), list(unique.values()), allow_unused=True)
                for i, g in zip(unique, grads, strict=True):
                    if g is not None:
                        totals[i] += of(g.float()) / count
        return [totals[id(p)] for p in params]

    def directions(self, sites: list[Site], k: int) -> list[tuple[Tensor, Tensor]]:
        """For each site the leading directions of what its module is given: V (k, in), orthonormal, and the share of
        the inputs' squared norm that each explains, (k), both in fp32.

        From an SVD that is carried along batch by batch, so that memory is k · in and not in².
        """
        sketch: dict[str, Tensor] = {}
        energy: dict[str, float] = {}
        wanted = {s.path: min(k + OVER, s.inp) for s in sites}

        def see(path: str, x: Tensor) -> None:
            energy[path] = energy.get(path, 0.0) + float((x * x).sum())
            both = torch.cat([sketch[path], x]) if path in sketch else x
            _, s, v = torch.linalg.svd(both, full_matrices=False)
            n = wanted[path]
            sketch[path] = s[:n, None] * v[:n]

        self._watched(sites, see)
        out = []
        for s in sites:
            length = sketch[s.path].norm(dim=1)
            out.append((sketch[s.path][:k] / length[:k, None].clamp(min=1e-12), length[:k] ** 2 / max(energy[s.path], 1e-12)))
        return out

    def moments(self, sites: list[Site]) -> list[Tensor]:
        """For each site the mean of x xᵀ (in, in) over what its module is given, uncentred, in fp32."""
        total: dict[str, Tensor] = {}
        count: dict[str, int] = {}

        def see(path: str, x: Tensor) -> None:
            total[path] = total.get(path, 0) + x.t() @ x
            count[path] = count.get(path, 0) + len(x)

        self._watched(sites, see)
        return [total[s.path] / count[s.path] for s in sites]

    def _watched(self, sites: list[Site], see: Callable[[str, Tensor], None]) -> None:
        """Show `see` the inputs (n, in) of every site's module, by its path, batch by batch, in fp32.

        Raises: CapabilityError for a module that no batch reaches.
        """
        from .methods.part import module_at

        reached: set[str] = set()

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any = None) -> None:
                x = args[0] if args else next(iter((kwargs or {}).values()))
                reached.add(path)
                see(path, x.detach().flatten(0, -2).float())

            return hook

        paths = dict.fromkeys(s.path for s in sites)
        handles = [module_at(self.model, p).register_forward_pre_hook(watch(p), with_kwargs=True) for p in paths]
        try:
            with self._base(), torch.no_grad():
                for batch in self.batches:
                    call(self.model, batch)
        finally:
            for h in handles:
                h.remove()
        for path in paths:
            if path not in reached:
                raise CapabilityError("no batch reaches this module", where=path, fix="Give batches as in training, or leave it out of `at`")

    def cache(self, sites: list[Site], n: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values (heads, n, head_dim) that attention at `sites` keeps of the first n tokens of the first row.

        Raises: CapabilityError where the base keeps no cache for them, or the row is shorter.
        """
        row = next(_rows(self.batches[0]))
        with self._base(), torch.no_grad():
            kept = getattr(call(self.model, {**row, "use_cache": True}), "past_key_values", None)
        layers = getattr(getattr(kept, "self_attention_cache", kept), "layers", [])
        found = [(layers[s.layer].keys, layers[s.layer].values) for s in sites if s.layer is not None and s.layer < len(layers)]
        if len(found) < len(sites) or any(k is None or k.dim() != 4 for k, _ in found):
            raise CapabilityError("the base keeps no cache of keys and values here", where=sites[0].path, fix="Choose the attention of a causal decoder")
        if found[0][0].shape[2] < n:
            raise CapabilityError(
                f"the first row of the batches has {found[0][0].shape[2]} tokens, and {n} are needed", fix="Give a longer text, or a shorter length"
            )
        return [(k[0, :, :n], v[0, :, :n]) for k, v in found]

    def _parameter(self, site: Site) -> nn.Parameter:
        from .methods.part import module_at

        p = module_at(self.model, site.path)._parameters.get(site.tensor or "weight")
        if p is None or not p.is_floating_point():
            raise CapabilityError(
                "this weight has no gradient, as in a quantised module", where=site.path, fix="Load the base unquantised to look at gradients"
            )
        return p

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The model in evaluation mode, its adapters off."""
        state = self.model.__dict__.get("_veneer_state")
        before = None if state is None else state.enabled
        try:
            if state is not None:
                state.enabled = False
            with evaluating(self.model):
                yield
        finally:
            if state is not None:
                state.enabled = before

    @contextmanager
    def _only(self, params: list[nn.Parameter]) -> Iterator[None]:
        """Gradients for `params` and no others."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        mine = {id(p) for p in params}
        try:
            for p, _ in before:
                p.requires_grad_(id(p) in mine)
            with torch.enable_grad():
                yield
        finally:
            for p, needed in before:
                p.requires_grad_(needed)


def _rows(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one."""
    tensors = list(batch.values()) if hasattr(batch, "values") else list(batch) if isinstance(batch, (tuple, list)) else [batch]
    n = next(t.shape[0] for t in tensors if isinstance(t, Tensor) and t.dim())

    def row(t: Any, i: int) -> Any:
        return t[i : i + 1] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t

    for i in range(n):
        if hasattr(batch, "items"):
            yield {k: row(v, i) for k, v in batch.items()}
        else:
            yield tuple(row(t, i) for t in tensors)
