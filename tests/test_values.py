"""Checks of value: with equal weights, the outputs of other implementations and of the plain equations.

Against the installed PEFT, by copying tensors; against AdapterHub's own outputs (tests/fixtures, with the script that
made them); gates against hooks written out by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer as vn
from test_peft_format import logits, quietly, shake, shaken
from zoo import ZOO

FIXTURES = Path(__file__).parent / "fixtures"


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.detach().abs().max())), rtol=0)


def parts_of(adapter: vn.Adapter, method: str) -> dict[str, Any]:
    return {p.site.path: p for p in adapter.parts if p.method_name == method}


# -- Hugging Face PEFT, tensor by tensor ------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "names"), [("bert", ["query", "value"]), ("llama", ["q_proj", "v_proj"]), ("t5", ["q", "v"])])
def test_lora_is_pefts(kind: str, names: list[str]) -> None:
    inputs = ZOO[kind].inputs(2, 7)
    theirs = shaken(ZOO[kind].build(), peft.LoraConfig(r=4, lora_alpha=12, target_modules=names))
    model = ZOO[kind].build()
    adapter = vn.attach(model, vn.LoRA(4, alpha=12, at="attn.{q,v},cross.{q,v}" if kind == "t5" else None))
    with torch.no_grad():
        for path, p in parts_of(adapter, "lora").items():
            layer = theirs.base_model.model.get_submodule(path)
            p.A.copy_(layer.lora_A["default"].weight)
            p.B.copy_(layer.lora_B["default"].weight)
    same(logits(model, inputs), logits(theirs, inputs))


@pytest.mark.parametrize(
    ("kind", "names", "inner"),
    [("bert", ["key", "value", "output.dense"], "output.dense"), ("llama", ["k_proj", "v_proj", "down_proj"], "down_proj"), ("t5", ["k", "v", "wo"], "wo")],
)
def test_ia3_is_pefts(kind: str, names: list[str], inner: str) -> None:
    inputs = ZOO[kind].inputs(2, 7)
    theirs = shaken(ZOO[kind].build(), peft.IA3Config(target_modules=names, feedforward_modules=[inner]))
    model = ZOO[kind].build()
    adapter = vn.attach(model, vn.IA3())
    with torch.no_grad():
        for path, p in parts_of(adapter, "ia3").items():
            p.l.copy_(theirs.base_model.model.get_submodule(path).ia3_l["default"].reshape(-1))
        for n, p in theirs.named_parameters():  # BERT's attention has an output.dense too, which the paper leaves alone
            if "ia3_l" in n and "attention.output" in n:
                p.fill_(1.0)
    same(logits(model, inputs), logits(theirs, inputs))


TASK = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_prompt_is_pefts(kind: str) -> None:
    inputs = ZOO[kind].inputs(2, 7)
    theirs = shaken(ZOO[kind].build(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type=TASK[kind]))
    model = ZOO[kind].build()
    adapter = vn.attach(model, vn.PromptTuning(3, before_cls=True))
    with torch.no_grad():
        adapter.parts[0].vectors.copy_(theirs.prompt_encoder["default"].embedding.weight[:3])
    ours = logits(model, inputs)
    same(ours, logits(theirs, inputs)[:, -ours.shape[1] :])


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_prefix_is_pefts(kind: str) -> None:
    """PEFT's prefix is a cache: it takes positions, and in T5 counts in the relative ones, so those are silenced there."""

    def build() -> nn.Module:
        model = ZOO[kind].build()
        for n, p in model.named_parameters():
            if "relative_attention_bias" in n:
                nn.init.zeros_(p)
        return model

    inputs = ZOO[kind].inputs(2, 7)
    theirs = shaken(build(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=TASK[kind]))
    table = theirs.prompt_encoder["default"].embedding.weight
    model = build()
    adapter = vn.attach(model, vn.Prefix(3, at="decoder/attn") if kind == "t5" else vn.Prefix(3, positions=True))
    kv = [p for p in adapter.parts if p.acts == "kv"]
    with torch.no_grad():
        slots = table.unflatten(-1, (2 * len(kv), -1))
        for i, p in enumerate(kv):
            first = 2 * i if kind != "t5" else 4 * i % (2 * len(kv))  # PEFT steps over a cross-attention that it drops
            p.keys.copy_(slots[:, first])
            p.values.copy_(slots[:, first + 1])
    same(logits(model, inputs), logits(theirs, inputs))


def test_positions_of_a_prefix() -> None:
    """With positions the sequence starts at n: as if its position ids had been given so."""
    for kind in ("llama", "gpt2"):
        inputs = {k: v for k, v in ZOO[kind].inputs(2, 7).items() if k != "attention_mask"}
        model = ZOO[kind].build()
        shake(vn.attach(model, vn.Prefix(3), name="plain").parameters())
        given = {**inputs, "position_ids": torch.arange(3, 10)[None].expand(2, -1)}
        expected = logits(model, given)
        vn.attach(model, vn.Prefix(3, positions=True), name="placed")
        for a, b in zip(parts_of(vn.Adapter(model, "plain"), "prefix").values(), [p for p in vn.Adapter(model, "placed").parts if p.acts == "kv"], strict=True):
            b.load_state_dict(a.state_dict())
        same(logits(model, inputs), expected)
        ids = inputs["input_ids"]
        same(generated(model, ids, True), generated(model, ids, False))


def test_two_tables_of_positions() -> None:
    model = ZOO["gpt2"].build()
    for name in ("a", "b"):
        vn.attach(model, vn.Prefix(3, positions=True), name=name)
    vn.activate(model, ["a", "b"])
    with pytest.raises(vn.CapabilityError, match="table at 'transformer.wpe'.*one of them at a time"):
        logits(model, ZOO["gpt2"].inputs(2, 7))


def generated(model: Any, ids: Tensor, cached: bool) -> Tensor:
    return quietly(model.generate, ids, max_new_tokens=4, do_sample=False, use_cache=cached, pad_token_id=0).float()


# -- AdapterHub's own outputs -----------------------------------------------------------------------------------------
AH = load_file(FIXTURES / "adapterhub.safetensors")
PLANS: dict[str, Any] = {
    "sequential": lambda: vn.Bottleneck(4),
    "parallel": lambda: vn.Bottleneck(8 // 2, parallel=True, scale=4.0),
    "houlsby": lambda: vn.Bottleneck(reduction=4, activation="swish", at="attn,ffn"),
    "prefix": lambda: vn.Prefix(3),
    "lora": lambda: vn.LoRA(2, alpha=6),
    "gated-sequential": lambda: vn.gated(vn.Bottleneck(4)),
    "gated-parallel": lambda: vn.gated(vn.Bottleneck(4, parallel=True, scale=4.0)),
    "gated-prefix": lambda: vn.gated(vn.Prefix(3), gate="published"),
    "gated-lora": lambda: vn.gated(vn.LoRA(2)),
    "unipelt": lambda: vn.gated(vn.Bottleneck(4) + vn.Prefix(3) + vn.LoRA(2), gate="published"),
}


@pytest.mark.parametrize("case", PLANS)
def test_adapterhub(case: str) -> None:
    from transformers import BertConfig, BertModel

    sizes = json.loads((FIXTURES / "adapterhub.json").read_text())["sizes"]
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    model.load_state_dict({k.removeprefix("base/"): v for k, v in AH.items() if k.startswith("base/")})
    adapter = vn.attach(model, PLANS[case]())
    own = {k.removeprefix(f"{case}/"): v for k, v in AH.items() if k.startswith(f"{case}/")}
    expected = own.pop("output")
    used = set()

    def put(target: Tensor, key: str) -> None:
        used.add(key)
        target.copy_(own[key].reshape(target.shape))

    with torch.no_grad():
        for p in adapter.parts:
            path, stem = p.site.path, ""
            if p.method_name == "bottleneck":
                stem = f"{path.removesuffix('.dense')}.adapters.{case}"
                for ours, theirs in (("down", "adapter_down.0.weight"), ("down_bias", "adapter_down.0.bias"), ("up", "adapter_up.weight")):
                    put(getattr(p, ours), f"{stem}.{theirs}")
                put(p.up_bias, f"{stem}.adapter_up.bias")
                stem += ".gate"
            elif p.method_name == "lora":
                stem = f"{path}.loras.{case}"
                put(p.A, f"{stem}.lora_A")
                put(p.B, f"{stem}.lora_B")
                stem += ".gate"
            else:
                pool = f"encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.{case}.self_prefix.control_trans"
                pairs = own[pool].reshape(3, 2, 2, -1)
                used.add(pool)
                p.keys.copy_(pairs[:, p.site.layer, 0])
                p.values.copy_(pairs[:, p.site.layer, 1])
                stem = f"{path}.prefix_tuning.prefix_gates.{case}"
            if p.gate is not None:
                put(p.gate.weight, f"{stem}.weight")
                put(p.gate.bias, f"{stem}.bias")
    assert used == set(own)
    gated = any(p.gate is not None for p in adapter.parts)
    mask = torch.ones_like(AH["mask"]) if gated else AH["mask"]  # AdapterHub's gates count padding
    with torch.no_grad():
        out = model(AH["ids"], attention_mask=mask).last_hidden_state
        assert not torch.allclose(expected, model.get_submodule("")(AH["ids"][:, :1].expand(-1, 6)).last_hidden_state, atol=1e-2)
        same(out, expected)


# -- gates, by hand ---------------------------------------------------------------------------------------------------
def masked_mean(s: Tensor, mask: Tensor) -> Tensor:
    return (s * mask).sum(1) / mask.sum(1)


def gate(p: Any, x: Tensor, mask: Tensor) -> Tensor:
    """One number for each example, as (B, 1, 1)."""
    return masked_mean(torch.sigmoid(x @ p.gate.weight + p.gate.bias), mask)[:, None, None]


@pytest.mark.parametrize("how", ["deviation", "published"])
def test_unipelt_by_hand(how: str) -> None:
    """UniPELT on BERT with padding, by forward hooks and an attention written out, with the masked mean."""
    inputs = ZOO["bert"].inputs(3, 7)
    assert not inputs["attention_mask"].all()
    model = ZOO["bert"].build()
    adapter = vn.attach(model, vn.gated(vn.Bottleneck(4, activation="gelu") + vn.Prefix(3) + vn.LoRA(2), gate=how))
    shake(adapter.parameters(), 3)
    ours = logits(model, inputs)

    base = ZOO["bert"].build()
    mask = inputs["attention_mask"].float()
    bottleneck, prefix = (parts_of(adapter, m) for m in ("bottleneck", "prefix"))
    lora = parts_of(adapter, "lora")
    for path, p in bottleneck.items():

        def after(module: nn.Module, args: Any, h: Tensor, p: Any = p) -> Tensor:
            f = F.linear(F.gelu(F.linear(h, p.down, p.down_bias)), p.up, p.up_bias)
            return h + gate(p, h, mask) * f

        base.get_submodule(path).register_forward_hook(after)
    for path, p in prefix.items():

        def attend(module: Any, args: Any, kwargs: Any, out: Any, path: str = path, p: Any = p) -> Any:
            x = args[0] if args else kwargs["hidden_states"]

            def project(name: str) -> Tensor:
                y = getattr(module, name)(x)
                a = lora.get(f"{path}.{name}")
                if a is not None:
                    y = y + gate(a, x, mask) * (x @ a.A.t() @ a.B.t())
                return y.unflatten(-1, (4, 8)).transpose(1, 2)

            q, k, v = (project(n) for n in ("query", "key", "value"))
            pk, pv = (t[None].expand(x.shape[0], -1, -1, -1) for t in p.keys_values())
            g = gate(p, x, mask)[..., None]
            if how == "published":
                pk, pv = g * pk, g * pv
            bias = torch.where(mask[:, None, None] > 0, 0.0, -math.inf)
            plain = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8) + bias, -1) @ v
            scores = torch.cat([q @ pk.transpose(-1, -2) / math.sqrt(8), q @ k.transpose(-1, -2) / math.sqrt(8) + bias], -1)
            both = torch.softmax(scores, -1) @ torch.cat([pv, v], 2)
            y = both if how == "published" else plain + g * (both - plain)
            return (y.transpose(1, 2).flatten(2), *out[1:])

        base.get_submodule(path).register_forward_hook(attend, with_kwargs=True)
    same(ours, logits(base, inputs))


def test_padding_does_not_count() -> None:
    """An example's gate is the same alone and in a batch whose other rows are longer."""
    model = ZOO["bert"].build()
    shake(vn.attach(model, vn.gated(vn.Bottleneck(4) + vn.LoRA(2))).parameters(), 2)
    inputs = ZOO["bert"].inputs(2, 7)
    n = int(inputs["attention_mask"][1].sum())
    assert n < 7
    alone = {k: v[1:, :n] for k, v in inputs.items()}
    same(logits(model, alone), logits(model, inputs)[1:])


def test_off_at_zero() -> None:
    """The prefix' gate at 0 is the base; the published one is not, since keys of zero still draw attention."""
    inputs = ZOO["bert"].inputs(2, 7)
    for how in ("deviation", "published"):
        model = ZOO["bert"].build()
        base = logits(model, inputs)
        adapter = vn.attach(model, vn.gated(vn.Prefix(3), gate=how))
        with torch.no_grad():
            for p in adapter.parts:
                p.gate.bias.fill_(-1e4)
        off = torch.allclose(logits(model, inputs), base, atol=1e-6)
        assert off == (how == "deviation")
