"""Checks of value for the additive methods: against PEFT, AdapterHub's own outputs, and the papers' equations in plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer as vn
from helpers import refuses
from test_peft_format import logits, quietly, shake, shaken
from veneer.ops.maps import map_of, take
from veneer.ops.weights import weight_of
from zoo import ZOO, loss, output

AH = load_file(Path(__file__).parent.parent / "fixtures" / "adapterhub_additive.safetensors")


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.detach().abs().max())), rtol=0)


def acting(adapter: vn.Adapter) -> list[Any]:
    return [p for p in adapter.parts if p.acts]


# -- AdapterHub's own outputs -----------------------------------------------------------------------------------------
def adapterhub(case: str, plan: vn.Plan) -> tuple[nn.Module, vn.Adapter, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=16)
    model = BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False).eval()
    model.load_state_dict({k.removeprefix("base/"): v for k, v in AH.items() if k.startswith("base/")})
    return model, vn.attach(model, plan), {k.removeprefix(f"{case}/"): v for k, v in AH.items() if k.startswith(f"{case}/")}


def compare(model: nn.Module, expected: Tensor) -> None:
    with torch.no_grad():
        assert not torch.allclose(AH["base-output"], expected, atol=1e-3)
        same(model(AH["ids"], attention_mask=AH["mask"]).last_hidden_state, expected)


def test_compacter_is_adapterhubs() -> None:
    model, adapter, theirs = adapterhub("compacter", vn.Compacter(n=4, size=8))
    with torch.no_grad():
        for p in acting(adapter):
            stem = f"{p.site.path.removesuffix('.dense')}.adapters.compacter"
            for half, key in (("down", "adapter_down.0"), ("up", "adapter_up")):
                getattr(p, f"{half}_s").copy_(theirs[f"{stem}.{key}.W_right"].mT)  # theirs is x H, ours W x
                getattr(p, f"{half}_t").copy_(theirs[f"{stem}.{key}.W_left"].mT)
                getattr(p, f"{half}_bias").copy_(theirs[f"{stem}.{key}.b"])
        adapter.parts[0].A.copy_(theirs["shared_parameters.compacter.phm_rule"].mT)
    compare(model, theirs["output"])


def test_invertible_is_adapterhubs() -> None:
    model, adapter, theirs = adapterhub("invertible", vn.Invertible() + vn.Bottleneck(4))
    coupling = adapter.parts[0]
    with torch.no_grad():
        for k in "FG":
            for ours, key in (("down", "0.weight"), ("bias", "0.bias"), ("up", "2.weight"), ("end", "2.bias")):
                getattr(coupling, f"{k}_{ours}").copy_(theirs[f"invertible_adapters.invertible.{k}.{key}"])
        for p in acting(adapter)[1:]:
            stem = f"{p.site.path.removesuffix('.dense')}.adapters.invertible"
            for ours, key in (
                ("down", "adapter_down.0.weight"),
                ("down_bias", "adapter_down.0.bias"),
                ("up", "adapter_up.weight"),
                ("up_bias", "adapter_up.bias"),
            ):
                getattr(p, ours).copy_(theirs[f"{stem}.{key}"])
    compare(model, theirs["output"])


# -- Compacter ----------------------------------------------------------------------------------------------------------
def test_compacter_is_a_sum_of_kronecker_products() -> None:
    inputs = ZOO["llama"].inputs(2, 7)
    model, base = ZOO["llama"].build(), ZOO["llama"].build()
    adapter = vn.attach(model, vn.Compacter(n=4, size=8, rank=3))
    shake(adapter.parameters(), 0)
    a = adapter.parts[0].A
    for p in acting(adapter):

        def after(module: Any, args: Any, h: Tensor, p: Any = p) -> Tensor:
            down, up = (sum(torch.kron(a[i], s[i] @ t[i]) for i in range(4)) for s, t in ((p.down_s, p.down_t), (p.up_s, p.up_t)))
            return h + F.linear(F.gelu(F.linear(h, down, p.down_bias)), up, p.up_bias)

        base.get_submodule(p.site.path).register_forward_hook(after)
    same(logits(model, inputs), logits(base, inputs))
    assert sum(p.numel() for p in adapter.parameters()) == 4**3 + 4 * (2 * 3 * (32 + 8) + 32 + 8)
    for text, make in {
        "no multiple of n = 4.*Give 8": lambda: vn.Compacter(size=6),
        "either size or reduction": lambda: vn.Compacter(size=4, reduction=2),
        "width 32 of .* is no multiple of n = 5": lambda: vn.attach(ZOO["llama"].build(), vn.Compacter(n=5)),
    }.items():
        with refuses(vn.PlanError, text):
            make()


# -- AdapterDrop --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [vn.Bottleneck(4, at="all"), vn.Compacter(size=4)], ids=["bottleneck", "compacter"])
def test_skipped_layers_are_as_if_they_had_no_adapter(method: Any, tmp_path: Path) -> None:
    inputs = ZOO["bert"].inputs(2, 7)
    model, base = ZOO["bert"].build(), ZOO["bert"].build()
    adapter = vn.attach(model, method, name="a")
    shake(adapter.parameters(), 0)
    whole = logits(model, inputs)
    vn.skip(model, 2, name="a")
    upper = vn.attach(base, vn.Plan.from_dict({**method.to_dict(), "at": "attn@2:,ffn@2:"}))
    values = {k: v for k, v in adapter.named_parameters()}
    with torch.no_grad():
        for k, p in upper.named_parameters():
            p.copy_(values[k])
    same(logits(model, inputs), logits(base, inputs))
    vn.save(model, tmp_path / "a")
    fresh = ZOO["bert"].build()
    assert next(vn.load(fresh, tmp_path / "a").plan.leaves()).skip == 2
    same(logits(fresh, inputs), logits(base, inputs))
    vn.skip(fresh, 0)
    same(logits(fresh, inputs), whole)
    with refuses(vn.CapabilityError, "no method of 'l' can be left out"):
        vn.attach(fresh, vn.LoRA(2), name="l")
        vn.skip(fresh, 1)


def test_training_draws_a_number_of_layers_for_each_step() -> None:
    model = ZOO["bert"].build()
    adapter = vn.attach(model, vn.Bottleneck(4, activation="gelu", drop=11))
    inputs = ZOO["bert"].inputs(2, 7)
    seen = set()
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for step in range(1, 13):
            model.zero_grad()
            loss(model, inputs).backward()
            used = tuple(p.site.layer for p in adapter.parts if p.up.grad is not None and p.up.grad.abs().sum() > 0)
            assert used in ((0, 1, 2), (1, 2), (2,))
            seen.add((checkpointed, used))
            vn.advance(model, step, 12)
    assert len(seen) == 6
    shake(adapter.parameters(), 0)
    model.eval()
    first = adapter.parts[0]
    outs = []
    for step in (1, 2, 3):  # outside of training the draw does not count
        vn.advance(model, step, 12)
        outs.append(logits(model, inputs))
    assert not first.idle() and torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# -- LLaMA-Adapter ------------------------------------------------------------------------------------------------------
def test_llama_adapter_is_pefts() -> None:
    """PEFT has one factor a layer, and no tanh; it recomputes the query with the rotation, as ours is given it."""
    inputs = ZOO["llama"].inputs(2, 7)
    theirs = shaken(ZOO["llama"].build(), peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM"))
    model = ZOO["llama"].build()
    adapter = vn.attach(model, vn.LlamaAdapter(5, per_head=False))
    with torch.no_grad():
        for p in adapter.parts:
            layer = theirs.base_model.model.get_submodule(p.site.path)
            p.prompt.copy_(layer.adaption_prompt[0])
            p.g.copy_(torch.atanh(layer.adaption_gate))
    same(logits(model, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "torch_encoder"])
def test_llama_adapter_by_hand(kind: str) -> None:
    """A factor for each head, in attention written out: what is added goes through the output projection."""
    model, base = ZOO[kind].build(), ZOO[kind].build()
    inputs = ZOO[kind].inputs(2, 7)
    adapter = vn.attach(model, vn.LlamaAdapter(3, at="decoder/attn" if kind == "t5" else None))
    shake(adapter.parameters(), 1)
    with torch.no_grad():
        for p in adapter.parts:
            p.prompt.mul_(8)
            p.g.mul_(8)
    sites = {(s.tower, s.layer, s.role): s for s in vn.sites(base) if s.port == "weight"}

    def matrix(s: Any) -> tuple[Tensor, Any]:
        m = base.get_submodule(s.path)
        b = m._parameters.get((s.tensor or "weight").replace("weight", "bias"))
        return weight_of(m, s, map_of(s, m)), 0 if b is None else take(b, s.slice, 0)

    for p in adapter.parts:
        (wq, bq), (wk, bk), (wv, bv), (wo, _) = (matrix(sites[p.site.tower, p.site.layer, f"attn.{x}"]) for x in "qkvo")
        heads = len(p.g)
        pk, pv = ((p.prompt @ w.t() + b).unflatten(-1, (heads, -1)).transpose(0, 1) for w, b in ((wk, bk), (wv, bv)))
        scale = 1.0 if kind == "t5" else pk.shape[-1] ** -0.5

        def after(
            module: Any, args: Any, kwargs: Any, out: Any, wq: Any = wq, bq: Any = bq, wo: Any = wo, p: Any = p, kv: Any = (pk, pv), scale: Any = scale
        ) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            q = (x @ wq.t() + bq).unflatten(-1, (len(p.g), -1)).transpose(1, 2)
            d = torch.softmax(q @ kv[0].mT * scale, -1) @ kv[1] * torch.tanh(p.g)[:, None, None]
            d = d.transpose(1, 2).flatten(2)
            d = d if kind == "bert" else d @ wo.t()  # BERT's output projection stands outside of the module
            return out + d if isinstance(out, Tensor) else (out[0] + d, *out[1:])

        where = base.get_submodule(p.site.path)
        where.register_forward_hook(after, with_kwargs=True)
    assert not torch.allclose(output(model, inputs), output(ZOO[kind].build(), inputs), atol=1e-4)
    same(output(model, inputs), output(base, inputs))


# -- ReFT ---------------------------------------------------------------------------------------------------------------
def reft_by_hand(base: nn.Module, adapter: vn.Adapter, rule: Any, chosen: Any) -> None:
    for p in adapter.parts:

        def after(module: Any, args: Any, out: Any, p: Any = p) -> Any:
            h = out if isinstance(out, Tensor) else out[0]
            new = h + rule(p, h) * chosen(h)
            return new if isinstance(out, Tensor) else (new, *out[1:])

        base.get_submodule(p.site.path).register_forward_hook(after)


@pytest.mark.parametrize("method", ["loreft", "direft", "direft-orthogonal"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_reft_by_hand(kind: str, method: str) -> None:
    inputs = ZOO[kind].inputs(2, 7)
    model, base = ZOO[kind].build(), ZOO[kind].build()
    plan = vn.LoReFT(3, positions="first:2+last:1") if method == "loreft" else vn.DiReFT(3, positions="first:2+last:1", orthogonal="ort" in method)
    adapter = vn.attach(model, plan)
    shake(adapter.parameters(), 1)
    ends = inputs["attention_mask"].sum(1)

    def chosen(h: Tensor) -> Tensor:
        keep = torch.zeros(*h.shape[:2], 1)
        for i, n in enumerate(ends.tolist()):
            keep[i, [0, 1, n - 1]] = 1.0
        return keep

    def rule(p: Any, h: Tensor) -> Tensor:
        r = p.R
        if method != "direft":  # Gram-Schmidt, row by row
            rows: list[Tensor] = []
            for row in p.R:
                for q in rows:
                    row = row - (row @ q) * q
                rows.append(row / row.norm())
            r = torch.stack(rows)
        new = h @ p.W.t() + p.b
        return (new - h @ r.t() if method == "loreft" else new) @ r

    reft_by_hand(base, adapter, rule, chosen)
    same(logits(model, inputs), logits(base, inputs))


def test_reft_chooses_the_same_tokens_on_either_side_of_the_padding_and_while_decoding() -> None:
    model = ZOO["llama"].build()
    shake(vn.attach(model, vn.LoReFT(2, positions="first:2+last:2")).parameters(), 1)
    ids = ZOO["llama"].inputs(1, 5)["input_ids"]
    plain = logits(model, {"input_ids": ids})
    pad, one = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    for left in (True, False):
        joined = [torch.cat([a, b] if left else [b, a], 1) for a, b in ((pad, ids), (pad, one))]
        out = logits(model, {"input_ids": joined[0], "attention_mask": joined[1]})
        same(out[:, 2:] if left else out[:, :5], plain)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    cached = quietly(model.generate, ids, **settings)
    with vn.prompted(model, [5]):
        assert torch.equal(quietly(model.generate, ids, use_cache=False, **settings), cached)
        again = logits(model, {"input_ids": cached})
    steps = quietly(model.generate, ids, output_logits=True, return_dict_in_generate=True, **settings).logits
    same(torch.stack(steps, 1), again[:, 4:-1])  # a training batch, prompt and answer, sees what generation sees
    for text in ("last:0", "middle:2", "first:1+first:2", ""):
        with refuses(vn.PlanError, "positions=.*first:4"):
            vn.LoReFT(positions=text)
    with refuses(vn.AdapterError, "number of the prompt's tokens"), vn.prompted(model, [0]):
        pass


@pytest.mark.parametrize("route", [["a", None, "a"], ["b", "a", "a"], ["a", "b", None]])
def test_reft_of_routed_rows_counts_their_own_prompts(route: list[str | None]) -> None:
    model = ZOO["llama"].build()
    for seed, name in enumerate("ab"):
        shake(vn.attach(model, vn.LoReFT(2, positions="last:2"), name=name).parameters(), seed)
    inputs, lengths = {"input_ids": ZOO["llama"].inputs(3, 7)["input_ids"]}, [3, 5, 4]
    with vn.route(model, route), vn.prompted(model, lengths):
        mixed = logits(model, inputs)
    for i, name in enumerate(route):
        vn.activate(model, name)
        with vn.prompted(model, lengths[i : i + 1]):
            same(mixed[i : i + 1], logits(model, {"input_ids": inputs["input_ids"][i : i + 1]}))


# -- invertible adapters --------------------------------------------------------------------------------------------------
def test_the_inverse_undoes_the_coupling_before_a_tied_head() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = dict(vocab_size=40, hidden_size=18, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    model = BertForMaskedLM(BertConfig(**config)).eval()
    adapter = vn.attach(model, vn.Invertible())
    shake(adapter.parameters(), 0)
    coupling, forward, back = adapter.parts
    assert back.site.path == "cls.predictions.decoder" and adapter.num_parameters == sum(p.numel() for p in coupling.parameters())
    x = torch.randn(2, 5, 18)
    y = x + forward.inward(x)
    assert not torch.allclose(x, y, atol=1e-2)
    same(y + back.inward(y), x)
    untied = BertForMaskedLM(BertConfig(**config, tie_word_embeddings=False))
    assert len(vn.attach(untied, vn.Invertible()).parts) == 2


# -- ladder ---------------------------------------------------------------------------------------------------------------
def test_ladder_by_hand_and_no_gradient_enters_the_base() -> None:
    inputs = ZOO["llama"].inputs(2, 7)
    model, base = ZOO["llama"].build(), ZOO["llama"].build()
    adapter = vn.attach(model, vn.Ladder(reduction=4))
    shake(adapter.parameters(), 0)
    (p,) = adapter.parts
    with torch.no_grad():
        states: list[Tensor] = []
        layers = [base.get_submodule(s.path) for s in vn.sites(base) if s.port == "hidden" and s.role == "layer"]
        layers[0].register_forward_pre_hook(lambda m, a: states.append(a[0]))
        for layer in layers:
            layer.register_forward_hook(lambda m, a, out: states.append(out if isinstance(out, Tensor) else out[0]))

        def side(module: Any, args: Any, out: Any) -> Any:
            s = states[0] @ p.D[0].t()
            for i, block in enumerate(p.blocks):
                mu = torch.sigmoid(p.a[i] / 0.1)
                s = mu * s + (1 - mu) * (states[i + 1] @ p.D[i + 1].t())
                s = s + block.down(F.gelu(block.up(block.norm(s))))
            return (out if isinstance(out, Tensor) else out[0]) + s @ p.U.t()

        layers[-1].register_forward_hook(side)
        same(logits(model, inputs), logits(base, inputs))
    entered: list[bool] = []
    for s in vn.sites(model):
        if s.port == "hidden" and s.role != "layer":
            model.get_submodule(s.path).register_forward_hook(lambda m, a, out: entered.append(out.requires_grad))
    grads = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss(model, {**inputs, "use_cache": False}).backward()
        assert entered and (checkpointed or not any(entered))
        grads.append(copy.deepcopy([q.grad for q in adapter.parameters()]))
        assert checkpointed or all(tap.x is None for tap in p.seen)  # nothing is held on to
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with refuses(vn.PlanError, "width varies"):
        vn.attach(ZOO["swin"].build(), vn.Ladder())


@pytest.mark.parametrize(
    "plan",
    [vn.Compacter(size=4), vn.LlamaAdapter(3), vn.LoReFT(2, positions="first:2+last:1"), vn.Invertible(), vn.Ladder(reduction=4), vn.Bottleneck(4, skip=1)],
    ids=lambda p: p.name,
)
def test_compiled_whole(plan: Any) -> None:
    """One graph, without a break, and the same answer."""
    import torch._dynamo

    torch._dynamo.reset()
    inputs = ZOO["llama"].inputs(2, 7)
    model = ZOO["llama"].build()
    shake(vn.attach(model, plan).parameters(), 0)
    with torch.no_grad():
        expected = logits(model, inputs)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        same(compiled(**inputs).logits, expected)
