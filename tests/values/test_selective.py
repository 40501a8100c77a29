"""Selective methods: which entries are chosen, that the rest stays, what is kept in memory and on disk, and PEFT's values."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer as vn
from helpers import build, fresh, look, loss, refuses, rewrite, shake, weights_of
from test_peft_format import logits, quietly, shaken
from veneer.ops import sparse
from zoo import ZOO


def scalar(out: Any) -> Tensor:
    return out.logits.float().square().mean()


def by_hand(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    names = [n for n, _ in model.named_parameters() if n.endswith("proj.weight")]
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(scalar(model(**inputs)), [params[n] for n in names])
    return dict(zip(names, grads, strict=True))


def chosen(adapter: vn.Adapter) -> dict[str, Tensor]:
    out = {}
    for p in adapter.parts:
        mask = torch.zeros(p.entries, dtype=torch.bool)
        mask[p.index.long()] = True
        out[f"{p.site.path}.weight"] = mask.reshape(p.site.out, p.site.inp)
    return out


def best(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    least = torch.cat([s.flatten() for s in scores.values()]).topk(k).values[-1]
    return {n: s >= least for n, s in scores.items()}


@pytest.mark.parametrize("name", ["magnitude", "grad", "snip", "fisher"])
def test_the_best_entries_of_the_model_are_chosen(name: str) -> None:
    model, inputs = fresh("llama")
    params = dict(model.named_parameters())
    k = 200
    if name == "magnitude":
        scores = {n: p.detach().abs() for n, p in params.items() if n.endswith("proj.weight")}
        plan: Any = vn.Magnitude(k=k)
    elif name == "fisher":
        rows = [by_hand(model, {key: v[i : i + 1] for key, v in inputs.items()}) for i in range(3)]
        scores = {n: sum(r[n] ** 2 for r in rows) / 3 for n in rows[0]}
        plan = vn.FisherMask(k=k)
    else:
        g = by_hand(model, inputs)
        scores = {n: v.abs() * (params[n].detach().abs() if name == "snip" else 1) for n, v in g.items()}
        plan = vn.GradientMask(k=k, criterion=name)
    adapter = vn.attach(model, plan, batches=[inputs], loss=scalar)
    expected, found = best(scores, k), chosen(adapter)
    assert found.keys() == expected.keys()
    for n, mask in found.items():
        assert torch.equal(mask, expected[n]) or (mask.sum() == 1 and not expected[n].any()), n


def test_a_budget_for_each_matrix() -> None:
    model, _ = fresh("llama")
    adapter = vn.attach(model, vn.Magnitude(0.1, per="matrix"), name="a")
    assert all(len(p.index) == round(0.1 * p.entries) for p in adapter.parts)
    low = vn.attach(model, vn.Magnitude(0.1, per="matrix", smallest=True, at="attn.q"), name="b")
    w = model.get_submodule(low.parts[0].site.path).weight.flatten()
    assert w[low.parts[0].index.long()].abs().max() < w[adapter.parts[0].index.long()].abs().min()


def test_random_is_pefts_shira() -> None:
    theirs = shaken(build("llama"), peft.ShiraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model, inputs = fresh("llama", 2)
    adapter = vn.attach(model, vn.RandomMask(r=2, at="attn.{q,v}"))
    with torch.no_grad():
        for p in adapter.parts:
            layer = theirs.base_model.model.get_submodule(p.site.path)
            rows, cols = layer.shira_indices["default"].long()
            assert len(rows) == len(p.index)
            order = (rows * p.site.inp + cols).sort()
            p.index.copy_(order.values)
            p.values.copy_(layer.shira_weight["default"][order.indices])
    torch.testing.assert_close(look(model, inputs), logits(theirs, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 1 / 4096], ids=["gathered", "dense"])
def test_both_ways_of_the_product_are_the_dense_ones(share: float, monkeypatch: Any) -> None:
    """Against autograd through a whole matrix, in several pieces."""
    monkeypatch.setattr(sparse, "SHARE", share)
    monkeypatch.setattr(sparse, "AT_ONCE", 60)
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True) for s in ((2, 5, 8), (17,)))
    index = torch.randperm(6 * 8, generator=g)[:17].sort().values.int()
    assert sparse.gathers(17, 6, 8) == (share == 1.0)
    y = sparse.sparse_product(x, v, index, 6)
    s = torch.zeros(48, dtype=torch.float64).index_copy(0, index.long(), v).reshape(6, 8)
    torch.testing.assert_close(y, x @ s.t())
    r = torch.randn(y.shape, dtype=torch.float64, generator=g)
    torch.testing.assert_close(torch.autograd.grad((y * r).sum(), (x, v)), torch.autograd.grad(((x @ s.t()) * r).sum(), (x, v)))
    assert torch.autograd.gradcheck(lambda a, b: sparse.sparse_product(a, b, index, 6), (x, v))


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    """What autograd holds between forward and backward: the input, the values and their places."""
    model = nn.Sequential(nn.Linear(64, 96))
    vn.attach(model, vn.Magnitude(0.05, at="all"))
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter) or t.requires_grad:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(3, 64)).sum().backward()
    assert max(n for n in kept if n != 64 * 96) <= 0.05 * 64 * 96 + 1 and kept.count(64 * 96) <= 1  # the base's own weight


def test_the_file_has_the_entries_alone(tmp_path: Any) -> None:
    model, inputs = fresh("llama")
    adapter = shake(vn.attach(model, vn.Magnitude(k=300), name="a"))
    n = adapter.num_parameters
    vn.save(model, tmp_path, name="a")
    data = load_file(weights_of(tmp_path))
    assert sum(t.numel() for t in data.values()) == 2 * n and 300 <= n <= 300 + len(adapter.parts)
    assert sum(t.numel() * t.element_size() for t in data.values()) == 8 * n
    optimiser = vn.adamw(model, lr=1e-3)
    loss(model, inputs).backward()
    optimiser.step()
    assert sum(t.numel() for s in optimiser.state.values() for t in s.values() if t.dim()) == 2 * n


def test_places_outside_the_matrix_are_a_damaged_file(tmp_path: Any) -> None:
    model, _ = fresh("llama")
    vn.attach(model, vn.Magnitude(k=50, at="attn.q") + vn.TrainableTokens((3, 9)), name="a")
    vn.save(model, tmp_path / "a", name="a")
    data = load_file(weights_of(tmp_path / "a"))
    for name, number in (("index", 1 << 20), ("index", -1), ("ids", 99)):
        bad = {k: v.clone() for k, v in data.items()}
        key = next(k for k in bad if k.endswith(name))
        bad[key][-1] = number
        folder = rewrite(tmp_path / "a", tmp_path / f"{name}{number}", tensors=bad)
        other, _ = fresh("llama")
        with refuses(vn.StoreError, "not among the", model=other):
            vn.load(other, folder)


# -- lottery tickets --------------------------------------------------------------------------------------------------
def train(model: nn.Module, inputs: Any, steps: int, optimiser: Any) -> None:
    for step in range(steps):
        scalar(model(**inputs)).backward()
        optimiser.step()
        vn.advance(model, step + 1, steps, optimiser)
        optimiser.zero_grad()


def test_a_lottery_ticket_rewinds_and_trains_what_moved_most(tmp_path: Any) -> None:
    model, inputs = fresh("llama")
    adapter = vn.attach(model, vn.LotteryTicket(k=100, at="attn.{q,v}"), name="a")
    whole = adapter.num_parameters
    optimiser = torch.optim.AdamW(vn.param_groups(model, 1e-2))
    moved: dict[int, Tensor] = {}
    for step in range(3):
        scalar(model(**inputs)).backward()
        optimiser.step()
        if step == 2:
            moved = {i: p.dense.detach().abs().flatten() for i, p in enumerate(adapter.parts)}
        else:
            vn.advance(model, step + 1, 6, optimiser)
        optimiser.zero_grad()
    with refuses(vn.AdapterError, "lottery exchanges its parameters", "optimiser"):
        vn.advance(model, 3, 6)
    assert adapter.num_parameters == whole
    vn.save(model, tmp_path / "first", name="a")
    before = look(model, inputs)
    again, _ = fresh("llama")
    vn.load(again, tmp_path / "first")
    assert torch.equal(look(again, inputs), before)

    vn.advance(model, 3, 6, optimiser)
    least = torch.cat(list(moved.values())).topk(100).values[-1]
    for i, p in enumerate(adapter.parts):
        assert p.dense is None and not p.values.any()
        assert torch.equal(p.index.long(), (moved[i] >= least).nonzero().flatten())
    assert adapter.num_parameters == 100 < whole
    held = [p for g in optimiser.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in adapter.parameters()} and not optimiser.state
    torch.testing.assert_close(look(model, inputs), look(fresh("llama")[0], inputs))  # rewound

    for step in range(3, 6):
        scalar(model(**inputs)).backward()
        optimiser.step()
        vn.advance(model, step + 1, 6, optimiser)
        optimiser.zero_grad()
    assert all(p.values.any() for p in adapter.parts if len(p.index))
    after = look(model, inputs)
    vn.save(model, tmp_path / "second", name="a")
    assert sum(t.numel() for t in load_file(weights_of(tmp_path / "second")).values()) == 200
    other, _ = fresh("llama")
    vn.load(other, tmp_path / "second")
    assert torch.equal(look(other, inputs), after)


def test_tickets_of_a_language_and_of_a_task_add() -> None:
    model, inputs = fresh("llama")
    base = look(model, inputs)
    for name in ("language", "task"):
        vn.attach(model, vn.LotteryTicket(0.02, first=0.3, at="attn.q@0"), name=name)
        train(model, {**inputs, "input_ids": inputs["input_ids"].roll(len(name), 1)}, 4, torch.optim.AdamW(vn.param_groups(model, 5e-2)))
    one, two = (vn.Adapter(model, n).parts[0].delta().detach() for n in ("language", "task"))
    vn.activate(model, ["language", "task"])
    both = look(model, inputs)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(one + two)
    torch.testing.assert_close(both, look(other, inputs), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, base, atol=1e-4)


def test_the_trainer_rewinds_too(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    from veneer.train.trainer import AdapterTrainer, Advance, fill_from, keep

    model, inputs = fresh("bert")
    vn.attach(model, vn.LotteryTicket(k=40, first=0.5, at="attn.q"), name="adapter")
    rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": torch.tensor(i % 3)} for i in range(3)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, report_to=[], use_cpu=True, learning_rate=1e-2)
    quietly(AdapterTrainer(model=model, args=args, train_dataset=rows, callbacks=[Advance()]).train)
    adapter = vn.Adapter(model, "adapter")
    assert adapter.num_parameters < 60 and all(p.dense is None and p.values.any() for p in adapter.parts)
    keep(model, "adapter", tmp_path / "kept")
    other, _ = fresh("bert")
    vn.attach(other, vn.LotteryTicket(k=40, first=0.5, at="attn.q"), name="adapter")
    fill_from(other, "adapter", tmp_path / "kept")  # a checkpoint of the second phase, into one of the first
    assert torch.equal(look(other, inputs), look(model, inputs))


# -- tokens, norms, layers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_pefts(tied: bool) -> None:
    from test_ties import tied as make

    ids = [5, 40, 71]
    model, inputs = make("llama") if tied else fresh("llama", 2)
    theirs = shaken(model, peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens"]))
    inputs["input_ids"][:, 1:3] = torch.tensor([40, 5])
    here, _ = make("llama") if tied else fresh("llama", 2)
    before = look(here, inputs)
    (part,) = vn.attach(here, vn.TrainableTokens(tuple(reversed(ids)))).parts
    rows = next(p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        part.delta.copy_(rows - here.get_input_embeddings().weight[ids])
    torch.testing.assert_close(look(here, inputs), logits(theirs, inputs), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(look(here, inputs), before, atol=1e-3)
    loss(here, inputs).backward()
    assert part.delta.grad.abs().sum(1).gt(0).tolist() == [True, True, tied]
    after = look(here, inputs)
    vn.merge(here)
    torch.testing.assert_close(look(here, inputs), after, atol=1e-5, rtol=1e-4)
    assert len(part.echoes) == tied


def test_norms_are_pefts() -> None:
    theirs = shaken(build("llama"), peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"))
    model, inputs = fresh("llama", 2)
    adapter = vn.attach(model, vn.NormTuning("name:.*input_layernorm"))
    with torch.no_grad():
        for p in adapter.parts:
            layer = theirs.base_model.model.get_submodule(p.site.path)
            p.delta.copy_(layer.ln_tuning_layers["default"].weight - model.get_submodule(p.site.path)._parameters["weight"])
    torch.testing.assert_close(look(model, inputs), logits(theirs, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
def test_the_last_layers_and_the_head(kind: str) -> None:
    model = ZOO[kind].build()
    adapter = vn.attach(model, vn.LastLayers(1), name="a")
    own = [p.site for p in adapter.parts]
    last = {s.tower: max(x.layer for x in vn.sites(model) if x.tower == s.tower and x.layer is not None) for s in own if s.layer is not None}
    assert all(s.role == "head" or s.layer == last[s.tower] for s in own) and any(s.role == "head" for s in own)
    assert all(s.layer is not None for s in (p.site for p in vn.attach(model, vn.LastLayers(1, head=False), name="b").parts))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: vn.Magnitude(0.0), "share=0.0"),
        (lambda: vn.Magnitude(k=0), "k must be"),
        (lambda: vn.Magnitude(per="layer"), "per is"),
        (lambda: vn.GradientMask(criterion="sni"), "snip"),
        (lambda: vn.TrainableTokens(), "list of ids"),
        (lambda: vn.TrainableTokens((1, 1)), "named twice"),
        (lambda: vn.LotteryTicket(first=1.0), "first must be"),
        (lambda: vn.LastLayers(0), "n must be"),
    ],
)
def test_wrong_options(make: Any, text: str) -> None:
    with refuses(vn.PlanError, text):
        make()


def test_what_does_not_fit_is_refused(base: Any) -> None:
    with refuses(vn.PlanError, "looks at data", "batches=", model=base):
        vn.attach(base, vn.FisherMask())
    with refuses(vn.PlanError, "has 99 tokens, and not 99", "resize_token_embeddings", model=base):
        vn.attach(base, vn.TrainableTokens((99,), at="name:.*word_embeddings"))
    with refuses(vn.PlanError, "Choose fewer", model=base):
        vn.attach(base, vn.RandomMask(r=40, at="attn.q"))
    with refuses(vn.SiteError, "tokens acts on maps of kind embedding"):
        vn.attach(build("vit"), vn.TrainableTokens((1,)))
