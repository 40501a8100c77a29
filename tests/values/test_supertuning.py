"""Super-tuning, against peft; and all of peft's further types together, as they are run."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from test_low_rank import AT, TARGETS, check, put, same

import veneer as vn
from helpers import build, fresh, grads, look, loss, refuses, shake


# -- super-tuning --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("r", [None, 3])
def test_supertuning_is_pefts(smallest: bool, r: int | None) -> None:
    config = peft.SupertuningConfig(sparsity=0.97, select_top=not smallest, r=r, target_modules=TARGETS)
    torch.manual_seed(2)
    other = peft.get_peft_model(build("llama"), config).eval()
    model = build("llama")
    adapter = shake(vn.attach(model, vn.SuperTuning(0.03, smallest=smallest, r=r, at=AT)))
    pairs = []
    for p in adapter.parts:
        layer = other.get_submodule(f"base_model.model.{p.site.path}")
        if hasattr(p, "values"):
            theirs = layer.supertuning_indices["default"]
            order = theirs.argsort()
            assert torch.equal(theirs[order], p.index)
            with torch.no_grad():
                layer.supertuning_values["default"][order] = p.values
            same(p.values, layer.supertuning_values["default"][order])
        else:
            pairs += [(p.A, layer.supertuning_lora_A["default"].weight), (p.B, layer.supertuning_lora_B["default"].weight)]
    if r:
        check(model, other, put(pairs))
    else:
        inputs = fresh("llama")[1]
        same(model(**inputs).logits, other(**inputs).logits)


# -- ways to run ---------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every input's .grad, also where it has none
def test_all_compile_without_graph_breaks_and_checkpoint() -> None:
    """Recomputing draws what was drawn before; a compiled layer gives the plain one's output."""
    model, inputs = fresh("bert")
    plan = vn.WaveFT(9, wavelet="db2", at="attn.q") + vn.PVeRA(4, kl=0.1, at="attn.k") + vn.SuperTuning(0.05, r=2, at="attn.v")
    adapter = shake(vn.attach(model, plan + vn.Poly(2, at="attn.o") + vn.Cartridge(3, positions=False)), scale=0.02)
    plain = look(model, inputs)
    model.train()

    def trained() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        loss(model, inputs).backward()
        return grads(adapter)

    expected = trained()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for n, g in trained().items():
        torch.testing.assert_close(g, expected[n], atol=1e-5, rtol=1e-3, msg=n)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(bool(g.isfinite().all()) for g in trained().values())
    model.eval()
    torch._dynamo.reset()
    model.bert.encoder.layer[0].compile(backend="aot_eager", fullgraph=True)
    same(look(model, inputs), plain)
    model.train()
    assert all(bool(g.isfinite().all()) for g in trained().values())
    torch._dynamo.reset()


BAD = [
    (lambda: vn.SuperTuning(alpha=3), "r is None", "r=8"),
    (lambda: vn.SuperTuning(r=0), "r must be", ""),
]


@pytest.mark.parametrize(("make", "what", "fix"), BAD, ids=[b[1] for b in BAD])
def test_bad_options(make: Any, what: str, fix: str) -> None:
    with refuses(vn.PlanError, what, fix):
        make()
