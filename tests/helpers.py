"""What several test files need: small models, a model compared with what it was, refusals checked by their text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer as vn
from veneer.files import digest
from zoo import ZOO, loss, output

__all__ = ["loss", "output"]  # the zoo's, handed on


# one of each port and every way that a part acts, on a model with all ports
MIXED = [
    {"method": "lora", "r": 2},
    {"method": "ia3"},
    {"method": "bitfit"},
    {"method": "bottleneck", "size": 3},
    {"method": "prefix", "length": 2},
    {"method": "full", "at": "head"},
]


def build(kind: str = "bert") -> nn.Module:
    """The zoo's model of that kind, the same numbers at each call."""
    return ZOO[kind].build()


def fresh(kind: str = "bert", batch: int = 3, length: int = 7) -> tuple[nn.Module, dict[str, Any]]:
    return build(kind), ZOO[kind].inputs(batch, length)


def shake(adapter: vn.Adapter, seed: int = 5, scale: float = 0.2) -> vn.Adapter:
    """Move every parameter away from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * scale)
    return adapter


def look(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


def grads(adapter: vn.Adapter) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}


def visible(model: nn.Module) -> dict[str, Any]:
    """Everything that can be seen of a model: modules and their classes, tensors and who they are, hooks, settings."""
    out: dict[str, Any] = {}
    for path, m in model.named_modules():
        plain = {k: v for k, v in m.__dict__.items() if not isinstance(v, (dict, set)) and not k.startswith("_")}
        hooks = [len(m.__dict__[k]) for k in sorted(m.__dict__) if k.endswith("_hooks")]
        out[f"module {path}"] = (type(m), m.training, sorted(k for k in m.__dict__ if k.startswith("_veneer")), hooks, sorted(plain))
        for k, v in plain.items():
            if isinstance(v, (int, float, str, bool, type(None))):
                out[f"attribute {path}.{k}"] = v
    for name, p in model.named_parameters(remove_duplicate=False):
        out[f"parameter {name}"] = (id(p), p.data_ptr(), p.requires_grad, p.dtype, *[t.clone() for t in whole(p.detach())])
    for name, b in model.named_buffers(remove_duplicate=False):
        out[f"buffer {name}"] = (id(b), b.detach().clone())
    return out


def whole(t: Tensor) -> list[Tensor]:
    """`t` as ordinary tensors: those within, where it is a quantiser's."""
    if not hasattr(t, "__tensor_flatten__"):
        return [t]
    return [p for name in t.__tensor_flatten__()[0] for p in whole(getattr(t, name))]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block must leave the model as it was."""
    before = visible(model)
    yield
    after = visible(model)
    assert list(before) == list(after), set(before) ^ set(after)
    for key, old in before.items():
        new = after[key]
        if isinstance(old, tuple) and isinstance(old[-1], Tensor):
            assert len(old) == len(new), key
            for a, b in zip(old, new, strict=True):
                if isinstance(a, Tensor):
                    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), key
                else:
                    assert a == b, key
        else:
            assert old == new, (key, old, new)


@contextlib.contextmanager
def refuses(error: type[vn.VeneerError], *texts: str, model: nn.Module | None = None) -> Iterator[None]:
    """The block raises `error` with all of `texts` (regular expressions) in its message, and leaves `model` as it was."""
    with unchanged(model) if model is not None else contextlib.nullcontext():
        with pytest.raises(error) as caught:
            yield
    message = str(caught.value)
    for text in texts:
        assert re.search(text, message), f"{text!r} is not in {message!r}"
    assert "\n" not in message and len(message) < 1200, message


# -- files --------------------------------------------------------------------------------------------------------------
def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter.json").read_text())


def weights_of(path: Path) -> Path:
    return path / config_of(path)["weights"]


def rewrite(source: Path, to: Path, change: Any = None, tensors: Any = None) -> Path:
    """A copy of an adapter, consistent in its digest and list, with its configuration or tensors changed."""
    to.mkdir(parents=True, exist_ok=True)
    config = config_of(source)
    if tensors is not None:
        config["tensors"] = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()}
        save_file(tensors, to / config["weights"])
    else:
        (to / config["weights"]).write_bytes(weights_of(source).read_bytes())
    config["sha256"] = digest((to / config["weights"]).read_bytes())
    if change is not None:
        change(config)
    (to / "adapter.json").write_text(json.dumps(config))
    return to


def save_mixed(path: Path) -> Path:
    """An adapter of every port, saved in `path`."""
    model = build()
    shake(vn.attach(model, MIXED, name="a"))
    return vn.save(model, path)
