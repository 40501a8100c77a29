"""Every method that changes weights, on every way in which a module applies one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import veneer as vn
from helpers import look, shake, unchanged
from test_contract import ALL_METHODS, total
from veneer.patterns import select
from zoo import ZOO

D = 32


class Around(nn.Module):
    """`inner` between an embedding and a head, its input shaped for it; `tied` gives the head the embedding's table."""

    def __init__(self, inner: nn.Module, shape: tuple[int, ...] = (), tied: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.head, self.shape = nn.Embedding(40, D), inner, nn.Linear(D, 40, bias=False), shape
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # B x 6 x D
        if self.shape:
            x = self.inner(x.transpose(1, 2).unflatten(2, self.shape)).flatten(2).transpose(1, 2)
        else:
            x = self.inner(x)
        return self.head(F.gelu(x[..., :D]))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(D, D)


@dataclass(frozen=True)
class Place:
    """A model, and a pattern that names maps of that kind in it; `zoo` where it is one of those."""

    build: Any
    at: str
    zoo: str = ""


PLACES = {
    "linear": Place(lambda: Around(nn.Linear(D, D)), "name:inner"),
    "conv1d": Place(lambda: Around(nn.Conv1d(D, D, 3, padding=1), (6,)), "name:inner"),
    "conv1d-depthwise": Place(lambda: Around(nn.Conv1d(D, D, 3, padding=1, groups=D), (6,)), "name:inner"),
    "conv2d": Place(lambda: Around(nn.Conv2d(D, D, (2, 3), stride=(1, 2), padding=1), (2, 3)), "name:inner"),
    "conv2d-groups": Place(lambda: Around(nn.Conv2d(D, D, 3, padding=1, groups=2, padding_mode="circular"), (2, 3)), "name:inner"),
    "conv3d": Place(lambda: Around(nn.Conv3d(D, D, (1, 2, 2), dilation=(1, 1, 2), padding=(0, 0, 1)), (1, 2, 3)), "name:inner"),
    "embedding": Place(lambda: Around(nn.Identity()), "name:embed"),
    "hf-conv1d": Place(lambda: Around(conv1d()), "name:inner"),
    "tied-embedding": Place(lambda: Around(nn.Identity(), tied=True), "name:embed"),
    "tied-head": Place(lambda: Around(nn.Identity(), tied=True), "name:head"),
    "fused-slices": Place(ZOO["gpt2"].build, "attn.{q,v}", "gpt2"),
    "interleaved-slices": Place(ZOO["gpt_neox"].build, "attn.{k,v}", "gpt_neox"),
    "experts": Place(ZOO["mixtral"].build, "ffn.*", "mixtral"),
    "experts-turned": Place(ZOO["gpt_oss"].build, "ffn.{up,down}", "gpt_oss"),
}


def methods() -> dict[str, Any]:
    """One instance of each method that has the weight port, or that masks tensors."""
    out: dict[str, Any] = {}
    for make in ALL_METHODS.values():
        for m in make().leaves():
            if "weight" in m.ports:
                out.setdefault(m.name, m)
    return out


METHODS = methods()


# what a method cannot do at a place, by its own equation: a part of the error's text
LIMITS = ("grouped convolution", "is over the rank", "is over the 3 inputs", "does not divide", "convolution's groups")


def put(place: Place, method: Any) -> tuple[nn.Module, vn.Adapter]:
    torch.manual_seed(0)
    model = place.build().eval()
    torch.manual_seed(1)
    data = {"batches": [inputs(place)], "loss": total} if method.needs_data else {}
    return model, vn.attach(model, method, name="a", **data)


def inputs(place: Place) -> dict[str, Tensor]:
    if place.zoo:
        return ZOO[place.zoo].inputs(3, 7)
    return {"input_ids": torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(1))}


def here(place: Place, name: str) -> Any:
    m = METHODS[name]
    own = {"tokens": tuple(range(1, 40))} if name == "tokens" else {}
    return replace(m, at=place.at, **own)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES)
def test_it_trains_is_saved_merges_and_comes_off(place: str, name: str, tmp_path: Any) -> None:
    p = PLACES[place]
    method, given = here(p, name), inputs(p)
    torch.manual_seed(0)
    base = p.build().eval()
    kinds = {s.kind for s in select(vn.sites(base), p.at, port="weight")}
    before = look(base, given)
    with unchanged(base):
        if method.kinds and not kinds & set(method.kinds):
            with pytest.raises(vn.SiteError, match=f"matches nothing that {name} can change.*acts on maps of kind {method.kinds[0]}"):
                put(p, method)
            return
    try:
        model, adapter = put(p, method)
    except vn.PlanError as e:
        assert any(limit in str(e) for limit in LIMITS), e
        return
    if method.identity_at_init:
        torch.testing.assert_close(look(model, given), before, atol=1e-5, rtol=1e-4)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = total(model(**given))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    shake(adapter)
    after = look(model, given)
    assert not torch.allclose(after, before, atol=1e-4)

    vn.save(model, tmp_path, name="a")
    torch.manual_seed(0)
    fresh = p.build().eval()
    vn.load(fresh, tmp_path, name="b")
    assert torch.equal(look(fresh, given), after)
    with vn.disabled(model):
        assert torch.equal(look(model, given), before)
    if method.mergeable:
        vn.merge(model, "a")
        torch.testing.assert_close(look(model, given), after, atol=1e-4, rtol=1e-3)
        vn.unmerge(model)
        assert torch.equal(look(model, given), after)
    vn.detach(model, "a")
    assert torch.equal(look(model, given), before)
    own, now = base.state_dict(), model.state_dict()
    assert list(own) == list(now) and all(torch.equal(now[k], v) for k, v in own.items())


@pytest.mark.parametrize("place", ["experts", "experts-turned", "tied-embedding", "tied-head", "fused-slices"])
def test_a_merged_model_is_saved_as_its_own_class(place: str, tmp_path: Any) -> None:
    """save_pretrained of the merged model, read by transformers alone."""
    import transformers

    name = PLACES[place].zoo or "llama"
    model = ZOO[name].build() if PLACES[place].zoo else transformers.LlamaForCausalLM(tied_llama()).eval()
    given = ZOO[name].inputs(2, 7)
    at = {"tied-embedding": "embed", "tied-head": "head"}.get(place, PLACES[place].at)
    shake(vn.attach(model, vn.LoRA(2, at=at), name="a"))
    after = look(model, given)
    vn.merge(model)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval() if type(model).__module__.startswith("transformers") else None
    plain = plain or getattr(transformers, model.config.architectures[0]).from_pretrained(tmp_path).eval()
    assert not any("veneer" in type(m).__module__ for m in plain.modules())
    torch.testing.assert_close(look(plain, given), after, atol=1e-4, rtol=1e-3)
    if place.startswith("tied"):
        assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


def tied_llama() -> Any:
    import transformers

    size = dict(vocab_size=99, hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return transformers.LlamaConfig(**size, tie_word_embeddings=True)
