"""Reading a folder of AdapterHub's: adapter_config.json and adapter.safetensors, and the head beside it."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import resolve
from ..adapter import Adapter
from ..attach import check_name
from ..errors import StoreError, did_you_mean
from ..files import read_json, read_tensors
from ..formats import CONFIG
from ..peft_format.config import Draft, Source
from ..peft_format.files import join_drafts, unfit
from ..plan import gated
from . import heads, methods

KEYS = ("config", "hidden_size", "model_class", "model_name", "model_type", "name", "version", "config_id")
PICKLE = (
    'Convert it once, where you trust it: python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('{old}', weights_only=True); save_file({{k: v.clone() for k, v in t.items()}}, '{new}')\""
)
PAIRS = {"adapter.safetensors": "pytorch_adapter.bin", "model_head.safetensors": "pytorch_model_head.bin"}


def owns(config: dict[str, Any]) -> bool:
    return "peft_type" not in config and "config" in config


def about(folder: Path, config: dict[str, Any]) -> tuple[str, str, str]:
    """The adapter's name, its base, and the class with the head that lies beside it."""
    kind = str(config.get("model_class") or "")
    if kind.endswith("AdapterModel"):  # its own, with any number of heads
        head = read_json(folder / heads.CONFIG) if (folder / heads.CONFIG).exists() else {}
        end = heads.ENDS.get(str((head.get("config") or {}).get("head_type")) if isinstance(head, dict) else "", "Model")
        kind = kind.removesuffix("AdapterModel") + end
    return str(config.get("name") or ""), str(config.get("model_name") or ""), kind


def load(model: nn.Module, folder: Path, name: str, *, activate: bool = True) -> Adapter:
    """Attach the AdapterHub adapter in `folder` as `name`: bottleneck, LoRA, (IA)³, prefix tuning and unions of them (MAM,
    UniPELT), with or without gates, and the prediction head where the model's own is such a head.

    Gates are means over an example's tokens. AdapterHub counts padding in them, here it does not count: outputs are the same
    on rows without padding. In causal towers its gates see later tokens, which is refused.

    Raises: StoreError for a pickle, a damaged file, another base, and, by its name, a field that has no counterpart here;
    the model is then as it was.
    """
    check_name(name)
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    own = config.get("name")
    if not isinstance(config.get("config"), dict) or not isinstance(own, str):
        raise StoreError("there is no configuration of a method, or no name", where=where, fix="Save it with AdapterHub's library again")
    tensors = _tensors(folder, "adapter.safetensors")
    source = Source(model, resolve.sites(model), {}, _at_home(model, tensors), where)
    parts = config["config"].get("configs") if config["config"].get("architecture") == "union" else [config["config"]]
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise source.fail("configs must be a list of methods")
    scaled: list[Draft] = []
    plain: list[Draft] = []
    seen: set[Any] = set()
    for part in parts:
        kind = part.get("architecture")
        if kind not in methods.FORMS or kind in seen:
            known = [k or "a bottleneck" for k in methods.FORMS]
            what = f"configs holds {kind!r} twice" if kind in seen else f"architecture={kind!r} cannot be read here"
            raise source.fail(what, f"{did_you_mean(str(kind), known)} Keep such an adapter in AdapterHub")
        seen.add(kind)
        drafts = _drafts(replace(source, config=part, by_path={}), methods.FORMS[kind], own)
        (scaled if part.get("use_gating") else plain).extend(drafts)
    if source.tensors:
        raise source.fail(f"there is a tensor {next(iter(source.tensors))!r}, which its configuration does not have", "The file is damaged; take another copy")
    if any(s.causal for d in scaled for s in d.values):
        raise source.fail(
            "use_gating=True in a causal tower: its mean runs over later tokens too", "Train it anew here: vn.gated(…) looks at the tokens so far"
        )
    if (folder / heads.CONFIG).exists():
        plain += heads.read(source, read_json(folder / heads.CONFIG), _tensors(folder, "model_head.safetensors"))
    drafts = [*scaled, *plain]
    plans = [gated(functools.reduce(operator.add, (d.method for d in scaled)), gate="published")] if scaled else []
    return join_drafts(source, functools.reduce(operator.add, [*plans, *(d.method for d in plain)]), drafts, name, activate)


def _tensors(folder: Path, file: str) -> dict[str, Tensor]:
    old = folder / PAIRS[file]
    if not (folder / file).exists() and old.exists():
        raise StoreError("the weights are a pickle, which can run code and is not read", where=str(old), fix=PICKLE.format(old=old, new=folder / file))
    return read_tensors(folder / file)


def _at_home(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys as from this model: with or without the name under which a model with a head holds its base."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside = prefix != "." and hasattr(model, prefix[:-1])
    has = any(k.startswith(prefix) for k in tensors)
    if inside and not has:
        return {prefix + k: v for k, v in tensors.items()}
    return tensors if inside else {k.removeprefix(prefix): v for k, v in tensors.items()}


def _drafts(source: Source, form: methods.Form, name: str) -> list[Draft]:
    form.check(source)
    try:
        found = methods.sort(form, name, source.tensors)
        if not found:
            raise ValueError("the file has no tensor of it")
        with unfit(source):
            return form.read(source, found)
    except KeyError as e:
        raise source.fail(f"a tensor {e.args[0]!r} is missing", "The file is not whole; take another copy") from e
    except (ValueError, RuntimeError, IndexError) as e:  # a tensor of another shape than the others
        raise source.fail(f"the tensors of {source.config.get('architecture') or 'the bottleneck'} do not fit together: {e}", "Take another copy") from e
