"""The regimes that training and serving run in: checkpointing, autocast, compiled layers, caches, padding."""

from __future__ import annotations

import pytest
import torch

import veneer as vn
from test_contract import ALL_METHODS, attach, close, make, shake
from zoo import loss, output

SOME = ("lora", "ia3", "bitfit", "bottleneck", "parallel", "prefix", "prompt", "gated-lora", "gated-token", "gated-bitfit", "unipelt")
DECODERS = ("llama", "gpt2", "gemma3", "gpt_neox", "mamba")


def attached(kind: str, method: str):
    made = attach(kind, method)
    if made is None:
        pytest.skip("the model has no such port")  # refused by test_contract's own check
    model, inputs, adapter, plan = made
    shake(adapter)
    return model, inputs, adapter, plan


def cases(kinds, methods=SOME):
    ports = {"mamba": ("prefix", "unipelt", "bitfit", "gated-bitfit"), "llama": ("bitfit", "gated-bitfit"), "gemma3": ("bitfit", "gated-bitfit"),
             "t5": ("bitfit", "gated-bitfit")}  # fmt: skip
    return [pytest.param(k, m, id=f"{k}-{m}") for k in kinds for m in methods if m not in ports.get(k, ())]


# -- gradient checkpointing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize(("kind", "method"), cases(("bert", "llama", "t5")))
def test_checkpointing_changes_no_gradient(kind: str, method: str, routed: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model, inputs, adapter, plan = attached(kind, method)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            inputs = {**inputs, "use_cache": False} if kind != "bert" else inputs
        if routed:
            with vn.route(model, ["a", None, "a"]):
                value = loss(model, inputs)
            value.backward()  # recomputes outside of the block
        else:
            loss(model, inputs).backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    # a sum's rounding goes by its largest terms, and T5's gradients reach the hundreds: so the tolerance follows them
    largest = max(float(g.abs().max()) for g in grads[0].values())
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], atol=1e-5 * max(1.0, largest / 10), rtol=1e-4, msg=n)


# -- half precision ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "method"), cases(("bert", "llama", "t5")))
def test_autocast_and_half_bases(kind: str, method: str) -> None:
    model, inputs, adapter, _ = attached(kind, method)
    with torch.no_grad():
        full = output(model, inputs).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = output(model, inputs)
        value.float().sum().backward()
    assert _relative(value.detach().float(), full) < 0.1
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in adapter.parameters())

    half, inputs = make(kind)
    half = half.to(torch.bfloat16)
    fresh = vn.attach(half, ALL_METHODS[method](), name="a")
    assert all(p.dtype == torch.float32 for p in fresh.parameters())  # masters
    with torch.no_grad():
        for mine, theirs in zip(fresh.parameters(), adapter.parameters(), strict=True):
            mine.copy_(theirs)
    out = output(half, inputs)
    assert out.dtype == torch.bfloat16
    assert _relative(out.detach().float(), full) < 0.1
    out.float().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh.parameters())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "method"), cases(DECODERS))
def test_generate_with_a_cache_equals_without(kind: str, method: str) -> None:
    model, _, _, _ = attached(kind, method)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    if (kind, method) == ("mamba", "gated-lora"):
        # the mixer reads weights that change from row to row: its state holds what one of them made, not the others'
        with pytest.raises(vn.CapabilityError, match="recurrent state"):
            model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
        return
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert cached.shape == (2, 9) and torch.equal(cached, plain)
    # by hand, one whole forward a token: what the logits say without any machinery of generate
    now = ids
    with torch.no_grad():
        for _ in range(5):
            now = torch.cat([now, model(input_ids=now, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(now, cached)


@pytest.mark.parametrize("method", [m for m in SOME if m not in ("bitfit", "gated-bitfit")])
def test_generate_encoder_decoder(method: str) -> None:
    model, inputs, _, _ = attached("t5", method)
    inputs.pop("decoder_input_ids")
    options = dict(max_new_tokens=5, do_sample=False, num_beams=2, eos_token_id=None)
    assert torch.equal(model.generate(**inputs, use_cache=True, **options), model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck", "prefix", "prompt", "unipelt"])
def test_routed_generate_equals_each_alone(method: str) -> None:
    model, _, a, plan = attached("llama", method)
    b = vn.attach(model, plan, name="b")
    shake(b, -0.3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids), num_beams=2)
    alone = {}
    for name in ("a", "b", None):
        vn.activate(model, name)
        alone[name] = model.generate(ids, **options)
    with vn.route(model, ["a", "b", None]):
        mixed = model.generate(ids, **options)
    for row, name in enumerate(("a", "b", None)):
        assert torch.equal(mixed[row], alone[name][row])


# -- padding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "method"), cases(("bert", "llama", "gpt2", "gemma3")))
def test_padding_changes_nothing(kind: str, method: str, side: str) -> None:
    if kind == "bert" and side == "left":
        side = "right"  # absolute positions count from the left, whatever the mask says
    model, _, _, _ = attached(kind, method)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    pad = torch.zeros(1, 3, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    marks = (torch.zeros_like(pad), torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), torch.zeros_like(pad))
    wide, mask = torch.cat(parts, 1), torch.cat(marks, 1)
    extra = {}
    if side == "left":
        # Positions as generate gives them. Without them the tokens would start at 3 instead of 0, and a prefix's keys,
        # which have no position, or a prompt before the padding would be seen from farther away, as they are in PEFT.
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = output(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        padded = output(model, {"input_ids": wide, "attention_mask": mask, **extra})
    if alone.dim() == 3:
        padded = padded[:, -5:] if side == "left" else padded[:, :5]
    close(padded, alone, 2e-5)


# -- compiled ---------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every input's .grad, also where it has none
@pytest.mark.parametrize(("kind", "method"), cases(("bert", "llama"), ("lora", "ia3", "bottleneck", "parallel", "prefix", "unipelt")))
def test_layers_compile_without_graph_breaks(kind: str, method: str) -> None:
    model, inputs, adapter, _ = attached(kind, method)
    inputs = {**inputs, "use_cache": False} if kind != "bert" else inputs
    loss(model, inputs).backward()
    want = {n: p.grad.clone() for n, p in adapter.named_parameters()}
    for p in adapter.parameters():
        p.grad = None
    with torch.no_grad():
        plain = output(model, inputs)
    torch._dynamo.reset()
    layers = next(m for n, m in model.named_modules() if n.endswith(("encoder.layer", "model.layers")))
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(output(model, inputs), plain)
    loss(model, inputs).backward()
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, want[n], atol=1e-4, rtol=1e-3, msg=n)
    torch._dynamo.reset()
