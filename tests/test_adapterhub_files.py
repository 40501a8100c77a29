"""AdapterHub's files, made by its own library on small random bases: read, they give the logits that it computed."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer as vn
from helpers import refuses, unchanged
from veneer.serve.convert import convert

FILES = Path(__file__).parent / "fixtures" / "adapterhub_files"
CLASSES = {
    "bert": "BertForSequenceClassification",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}
CASES = [p.relative_to(FILES).parent for p in sorted(FILES.glob("*/*/adapter_config.json"))]
READ = [c for c in CASES if not c.name.startswith("x-")]


def base(family: str, cls: str = ""):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, cls or CLASSES[family]).from_pretrained(FILES / family).eval()


def look(model, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def expected(case: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs, and AdapterHub's logits. Its gates count padding, so a gated adapter was called without any."""
    all_of = load_file(FILES / case.parent / "expected.safetensors")
    inputs = {k: v for k, v in all_of.items() if "/" not in k}
    if '"use_gating": true' in (FILES / case / "adapter_config.json").read_text():
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return inputs, all_of[f"logits/{case.name}"]


@pytest.mark.parametrize("case", READ, ids=str)
def test_the_logits_are_its_own(case: Path, tmp_path: Path) -> None:
    model = base(str(case.parent))
    inputs, theirs = expected(case)
    before = look(model, inputs)
    adapter = vn.load(model, FILES / case)
    ours = look(model, inputs)
    real = inputs.get("decoder_input_ids", inputs["attention_mask"]).bool()
    shown = slice(None) if case.parent.name == "bert" else real  # a padded token's own logits mean nothing
    torch.testing.assert_close(ours[shown], theirs[shown], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[shown], theirs[shown], atol=1e-2)
    assert adapter.name == "mine"
    vn.save(model, tmp_path)
    other = base(str(case.parent))
    vn.load(other, tmp_path)  # an ordinary adapter from here on
    assert torch.equal(look(other, inputs), ours)
    vn.detach(model)
    assert torch.equal(look(model, inputs), before)


def changed(case: str, to: Path, config=None, tensors=None) -> Path:
    """A copy of a case with its method's configuration or its tensors changed."""
    shutil.copytree(FILES / case, to)
    if config is not None:
        data = json.loads((to / "adapter_config.json").read_text())
        config(data)
        (to / "adapter_config.json").write_text(json.dumps(data))
    if tensors is not None:
        t = load_file(to / "adapter.safetensors")
        tensors(t)
        save_file(t, to / "adapter.safetensors")
    return to


REFUSED = {
    "bert/x-invertible": ["inv_adapter='nice' has no counterpart", "inv_adapter=None"],
    "bert/x-flex-head": ["prediction head does not match", "1 layers", "head_config.json out of a copy"],
    "bert/x-pickle": ["weights are a pickle", r"torch\.load\('.*pytorch_adapter\.bin', weights_only=True\)", r"adapter\.safetensors"],
    "llama/x-unipelt": ["use_gating=True in a causal tower", r"vn\.gated"],
    "t5/x-prefix": ["relative positions"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_so(case: str) -> None:
    model = base(case.partition("/")[0])
    with refuses(vn.StoreError, *REFUSED[case], model=model):
        vn.load(model, FILES / case)


FIELDS = {
    "phm_layer": ("seq-bn", True, "phm_layer=True has no counterpart"),
    "ln_after": ("seq-bn", True, "ln_after=True"),
    "original_ln_after": ("seq-bn", False, "original_ln_after=False"),
    "residual_before_ln": ("seq-bn", "post_add", "residual_before_ln='post_add'"),
    "scaling": ("seq-bn", "vector", "scaling must be a finite number"),
    "non_linearity": ("seq-bn", "softmax", "non_linearity='softmax'"),
    "reduction": ("seq-bn", 2, r"reduction=2 is not known.*reduction_factor"),
    "architecture": ("seq-bn", "reft", "architecture='reft' cannot be read"),
    "use_dora": ("lora", True, "use_dora=True"),
    "vera_d": ("lora", 0.1, "vera_d=0.1"),
    "r": ("lora", 3, "shape"),
    "composition_mode": ("lora", "mul", "composition_mode='mul'"),
    "prefix_length": ("prefix", 4, r"needs 'keys' of shape \[4, 16\]"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_without_a_counterpart_are_refused_by_name(field: str, tmp_path: Path) -> None:
    case, value, text = FIELDS[field]
    model = base("bert")
    folder = changed(f"bert/{case}", tmp_path / "copy", lambda c: c["config"].update({field: value}))
    with refuses(vn.StoreError, text, "adapter_config.json", model=model):
        vn.load(model, folder)


@pytest.mark.parametrize("case", ["bert/unipelt", "gpt2/ia3", "t5/houlsby", "bart/prefix"])
def test_damage_is_refused_and_leaves_the_model_alone(case: str, tmp_path: Path) -> None:
    model = base(case.partition("/")[0])
    keys = [k for k in load_file(FILES / case / "adapter.safetensors") if ".pool." not in k and ("0." in k or "prefix" in k)]
    with unchanged(model):
        for i, key in enumerate(keys):
            for j, cut in enumerate((lambda t, k=key: t.update({k: t[k].flatten()[:-1].clone()}), lambda t, k=key: t.pop(k))):
                folder = changed(case, tmp_path / f"{i}-{j}", tensors=lambda t, c=cut, k=key: [t.pop(o) for o in list(t) if ".pool." in o] and None or c(t))
                with pytest.raises(vn.StoreError, match=str(tmp_path)):
                    vn.load(model, folder)
    folder = changed(case, tmp_path / "more", tensors=lambda t: t.update({"model.odd.weight": torch.zeros(2)}))
    with refuses(vn.StoreError, "odd.weight", model=model):
        vn.load(model, folder)
    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    with refuses(vn.StoreError, "safetensors", model=model):
        vn.load(model, folder)
    vn.load(model, FILES / case)


def test_heads(tmp_path: Path) -> None:
    model = base("bert")
    with_head = vn.load(model, FILES / "bert" / "lora", name="a")
    assert {p.method_name for p in with_head.parts} == {"lora", "full"}
    flex = vn.load(model, FILES / "bert" / "flex-head", name="b")  # the library's own head: a tanh layer and a linear one
    assert {p.site.path for p in flex.parts if p.method_name == "full"} == {"bert.pooler.dense", "classifier"}
    unheaded = base("bert", "BertModel")
    with refuses(vn.StoreError, "classifier.*no such tensor", "BertForSequenceClassification", "read alone", model=unheaded):
        vn.load(unheaded, FILES / "bert" / "lora")
    folder = changed("bert/lora", tmp_path / "alone")
    (folder / "head_config.json").unlink()
    assert vn.load(unheaded, folder, name="its").name == "its"  # and the same keys serve a model without a head
    inputs, _ = expected(Path("bert/lora"))
    with torch.no_grad():
        inside = model.bert(**inputs).last_hidden_state
        vn.activate(model, "a")
        torch.testing.assert_close(model.bert(**inputs).last_hidden_state, unheaded(**inputs).last_hidden_state)
        assert not torch.allclose(inside, model.bert(**inputs).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize(("case", "format"), [("bert/seq-bn", "veneer"), ("llama/lora", "peft"), ("llama/ia3", "peft")])
def test_convert(case: str, format: str, tmp_path: Path) -> None:
    done = convert(FILES / case, tmp_path / "out", model=str(FILES / case.partition("/")[0]), format=None if format == "veneer" else format)
    assert done.format == format and done.difference.largest < 1e-5 < done.difference.effect
    model = base(case.partition("/")[0])
    vn.load(model, done.path, name="again")
    inputs, theirs = expected(Path(case))
    real = inputs["attention_mask"].bool() if "llama" in case else slice(None)
    torch.testing.assert_close(look(model, inputs)[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_a_folder_of_neither_library(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with refuses(vn.StoreError, "neither Hugging Face PEFT nor AdapterHub"):
        vn.load(base("bert"), tmp_path)
