"""Prediction heads that lie beside an AdapterHub adapter: read where the model's own head computes the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import StoreError
from ..methods import Full
from ..peft_format.config import Draft, Source
from ..peft_format.places import pattern
from ..sites import Site

CONFIG = "head_config.json"
# its types of heads -> what the names of transformers' classes with such a head end in
ENDS = {
    "classification": "ForSequenceClassification",
    "multilabel_classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
}


def read(source: Source, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Draft]:
    """vn.Full on the model's own head with the tensors of the file; nothing where these are the base's already."""
    model = source.model
    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "_veneer" not in n}
    head = config.get("config")
    named = tensors if head is None else _renamed(source, head, tensors)
    sites = {f"{s.path}.{s.tensor}" if s.path else s.tensor: s for s in source.sites if s.port == "param"}
    values: dict[Site, dict[str, Tensor]] = {}
    for key, value in named.items():
        if key not in own or own[key].shape != value.shape:
            there = "no such tensor" if key not in own else f"{list(own[key].shape)}"
            raise _other(source, f"{key!r} is {list(value.shape)} in the file, and {there} here", config)
        if own[key].is_meta or bool((own[key] != value.to(own[key])).any()):
            if key not in sites:
                raise _other(source, f"{key!r} is tied to another tensor here", config)
            values[sites[key]] = {"tensor": value}
    for path in {s.path for s in values}:  # a module's tensors are replaced together
        for key, site in sites.items():
            if site.path == path and site not in values:
                values[site] = {"tensor": own[key].detach()}
    return [Draft(Full(at=pattern(source.sites, list(values), source.where)), values)] if values else []


def _renamed(source: Source, head: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of its own heads, heads.NAME.1, heads.NAME.4, …, under the names of the model's."""
    model, kind = source.model, str(head.get("head_type"))
    linears = list(dict.fromkeys(k.rpartition(".")[0] for k in tensors))
    linears.sort(key=lambda k: int(k.rpartition(".")[2]))
    if kind not in ENDS or not type(model).__name__.endswith(ENDS[kind]):
        raise _other(source, f"a head of the type {kind!r}", head)
    mine = [p for p in dict.fromkeys(s.path for s in source.sites if s.port == "param" and s.role == "head") if isinstance(model.get_submodule(p), nn.Linear)]
    pooled = next((p for p, m in model.named_modules() if p.endswith("pooler.dense") and isinstance(m, nn.Linear)), None)
    if pooled is not None and not head.get("use_pooler"):  # its first layer is what the model's pooler is
        mine.insert(0, pooled)
    if len(mine) != len(linears) or (len(mine) > 1 and head.get("activation_function") != "tanh") or (pooled is None and head.get("use_pooler")):
        raise _other(source, f"a head of {head.get('layers')} layers with {head.get('activation_function')!r} between them", head)
    return {f"{new}.{k.rpartition('.')[2]}": v for old, new in zip(linears, mine, strict=True) for k, v in tensors.items() if k.rpartition(".")[0] == old}


def _other(source: Source, what: str, config: dict[str, Any]) -> StoreError:
    kind = config.get("model_class") or ENDS.get(str(config.get("head_type")), "another kind of head")
    return source.fail(
        f"the prediction head does not match the one of {type(source.model).__name__}: {what}",
        f"Load it on a model with such a head ({kind}), or take {CONFIG} out of a copy of the folder: the adapter is then read alone",
    )
