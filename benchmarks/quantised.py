"""Adapters over quantised bases, by the quantisers themselves: what works, what it costs, and what merging loses.

    python benchmarks/quantised.py                      # on a GPU; --device cpu runs those that a CPU can
    python benchmarks/quantised.py --only nf4 torchao-int4

The base is a small random Llama. A line is one quantiser and one plan: `base` MiB of the base's tensors; `dx` how far a
gradient through a packed map is from Wᵀ dy; `fell` how far five steps took the loss; `disabled` and `loaded` whether the
base's output, and that of the adapter read into another copy of the base, are the same bit for bit; then, for what merges,
the share of the adapter that the merge reports as lost in its worst matrix, and the share of its effect that is missing in
the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer as vn
from veneer.errors import CapabilityError
from veneer.ops.weights import asked
from veneer.requantise import INTO
from veneer.train.quantize import QUANTISERS, quantization

PLANS = {"lora": lambda: vn.LoRA(8, at="linear"), "ia3": lambda: vn.IA3(), "bottleneck": lambda: vn.Bottleneck(16)}


def tensors(value: Any) -> list[Tensor]:
    """The ordinary tensors that `value` is made of: a quantiser's may hold several."""
    if hasattr(value, "__tensor_flatten__"):
        return [t for name in value.__tensor_flatten__()[0] for t in tensors(getattr(value, name))]
    return [value.detach()]


def base_of(model: torch.nn.Module) -> dict[str, list[Tensor]]:
    return {k: [t.clone() for t in tensors(v.data)] for k, v in [*model.named_parameters(), *model.named_buffers()] if "_veneer" not in k}


def same(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


class Trial:
    """One quantiser: loads the base anew as often as it is asked."""

    def __init__(self, folder: Path, kind: str, device: str) -> None:
        self.folder, self.kind, self.device = folder, kind, device
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 999, (8, 64), generator=g).to(device)

    def load(self) -> torch.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(self.folder, **{"dtype": torch.bfloat16} | quantization(self.kind, self.device)).eval()

    def look(self, model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(self.ids).logits.float()

    def line(self, name: str) -> dict[str, Any]:
        model = self.load()
        row: dict[str, Any] = {"quantiser": self.kind, "plan": name}
        row["base MiB"] = round(sum(t.numel() * t.element_size() for ts in base_of(model).values() for t in ts) / 2**20, 1)
        row["class"] = type(model.model.layers[0].mlp.up_proj.weight.data).__name__
        model.train()
        adapter = vn.attach(model, PLANS[name](), name="a")
        own = base_of(model)
        optimiser = vn.adamw(model, lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(self.ids, labels=self.ids).loss
            loss.backward()
            dead = [n for n, p in adapter.named_parameters() if p.grad is None]
            assert not dead, f"no gradient reaches {dead[0]}, and {len(dead) - 1} more"
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        row["dx"] = f"{self.slope(model):.0e}"
        row["fell"] = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
        assert losses[-1] < losses[0]
        assert same(own, base_of(model)), "training changed the base"
        model.eval()
        after = self.look(model)
        with vn.disabled(model):
            before = self.look(model)
        other = self.load()
        row["disabled"] = bool(torch.equal(before, self.look(other)))
        with tempfile.TemporaryDirectory() as aside:
            vn.save(model, aside, name="a")
            vn.load(other, aside, name="a")
        row["loaded"] = bool(torch.equal(self.look(other), after))
        for into in INTO:
            row |= self.merge(model, into, before, after)
        vn.detach(model)
        assert torch.equal(self.look(model), before), "detaching did not restore the base"
        return row

    def slope(self, model: torch.nn.Module) -> float:
        """How far a gradient through a packed map is from Wᵀ dy."""
        module = model.model.layers[0].mlp.up_proj
        x = torch.randn(32, module.in_features, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        with vn.disabled(model):
            y = module(x)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        right = dy.float() @ asked(module, module.in_features, module._parameters["weight"]).float()
        return float((dx.float() - right).norm() / right.norm())

    def merge(self, model: torch.nn.Module, into: str, before: Tensor, after: Tensor) -> dict[str, Any]:
        try:
            merged = vn.merge(model, "a", into=into)
        except CapabilityError:
            return {into: "-"}
        missing = float((self.look(model) - after).norm() / (after - before).norm())
        vn.unmerge(model)
        assert torch.equal(self.look(model), after), "unmerging did not restore the adapter"
        return {into: f"{merged.error:.3f} / {missing:.3f}"}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--only", nargs="*", default=list(QUANTISERS))
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--out", default=os.environ.get("OUT", "results"))
    a = p.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if a.device != 'cpu' else 'cpu'}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = dict(vocab_size=1000, hidden_size=a.hidden, intermediate_size=2 * a.hidden, num_hidden_layers=4)
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).to(torch.bfloat16).save_pretrained(folder)
        for kind in a.only:
            for name in PLANS:
                try:
                    row = Trial(Path(folder), kind, a.device).line(name)
                except Exception as e:  # the others still run
                    traceback.print_exc()
                    row = {"quantiser": kind, "plan": name, "failed": f"{type(e).__name__}: {e}".partition("\n")[0][:300]}
                rows.append(row)
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    (Path(a.out) / f"quantised-{'-'.join(a.only)}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
