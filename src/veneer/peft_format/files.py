"""Reading and writing a folder in PEFT's format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import resolve
from ..adapter import Adapter, Record
from ..attach import attach, check_name, detach, state_of
from ..errors import AdapterError, CapabilityError, StoreError, VeneerError, did_you_mean
from ..formats import CONFIG
from ..plan import Plan, Sum
from ..store import read_json, read_tensors, write_folder, write_whole
from ..ties import shared
from . import derived, forms, ia3, lily, lora, soft, table, whole
from .config import AUTO, UNREAD, Draft, Source, check_fields, task_of

if TYPE_CHECKING:
    from ..methods.part import Part

WEIGHTS = "adapter_model.safetensors"
WHOLE = ("_indices", "frod_s_size")  # whole numbers: places of a matrix, and sizes
Written = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Codec:
    """One PEFT type: the method that is its own, those that it takes beside, the fields that it reads, and the prefix of
    its keys. Every type takes vn.Full, as modules_to_save."""

    peft_type: str
    method: str
    beside: tuple[str, ...]
    fields: Iterable[str]
    read: Callable[[Source], list[Draft]]
    write: Callable[[Any, list[Any], list[Any]], Written]  # of the model, the parts, and the methods of the plan's terms
    prefix: str = "base_model.model."
    roots: Mapping[str, str] = field(default_factory=dict)  # keys of tensors that stand once, and the prefix of each
    also: tuple[str, ...] = ()  # further methods that it can hold


CODECS = (
    Codec("LORA", "lora", ("bitfit",), lora.FIELDS, lora.read, lora.write, also=("dora", *lora.KIN)),
    Codec("IA3", "ia3", (), ia3.FIELDS, ia3.read, ia3.write),
    Codec("LN_TUNING", "full", (), whole.FIELDS, whole.read, whole.write),
    *(
        Codec(name, p.make.name, (), own, p.read, p.write, "base_model.", dict.fromkeys(keys, ""))
        for name, p, own, keys in (
            ("PROMPT_TUNING", soft.PROMPT, (), (soft.KEY,)),
            ("CPT", soft.CONTEXT, soft.CONTEXT_FIELDS, (soft.KEY,)),
            ("P_TUNING", soft.ENCODED, soft.ENCODER, (soft.KEY,)),
            ("MULTITASK_PROMPT_TUNING", soft.MULTITASK, soft.TASKS, (soft.KEY, *soft.FACTORS)),
        )
    ),
    Codec("CARTRIDGE", "cartridge", (), ("num_frozen_tokens",), soft.read_cartridge, soft.write_cartridge, "base_model.", {soft.KEY: ""}),
    Codec("PREFIX_TUNING", "prefix", (), ("prefix_projection",), soft.read_prefix, soft.write_prefix, "base_model.", {soft.KEY: ""}),
    *(
        Codec(f.peft_type, f.make.name, (), f.known(), partial(table.read, f), partial(table.write, f), roots=f.once(), also=f.also)
        for f in (*forms.FORMS, *derived.FORMS, lily.FORM)
    ),
)


def owns(config: dict[str, Any]) -> bool:
    return "peft_type" in config


def about(folder: Path, config: dict[str, Any]) -> tuple[str, str, str]:
    """The adapter's name (its folder's), its base, and transformers' class for its task."""
    return "", str(config.get("base_model_name_or_path") or ""), AUTO.get(str(config.get("task_type")), "")


# -- reading ----------------------------------------------------------------------------------------------------------
def load(model: nn.Module, path: Path, name: str, *, activate: bool = True) -> Adapter:
    """Attach the PEFT adapter in the folder `path` as `name`, of any of the types in CODECS, each with
    modules_to_save.

    A whole fused projection becomes its slices: each has A whole and its own rows of B, which is the same function; when
    trained further here, the copies of A go their own ways.

    Raises: StoreError for a file that is damaged, for another base, or says what cannot be read here; the model is then
    as it was.
    """
    check_name(name)
    where = str(path / CONFIG)
    config = read_json(path / CONFIG)
    types = {c.peft_type: c for c in CODECS}
    codec = types.get(str(config.get("peft_type")))
    if (kind := str(config.get("peft_type"))) in UNREAD:
        why, way_out = UNREAD[kind]
        raise StoreError(f"PEFT's {kind} cannot be read here: {why}", where=where, fix=way_out)
    if codec is None:
        raise StoreError(f"peft_type {config.get('peft_type')!r} cannot be read here", where=where, fix=did_you_mean(str(config.get("peft_type")), types))
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise StoreError(
            "the weights are a pickle, which can run code and is not read", where=str(path), fix="Save them with PEFT again: safe_serialization=True"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in read_tensors(path / WEIGHTS).items():
        own = next((key.removeprefix(prefix) for k, prefix in codec.roots.items() if f"{key}.".startswith(f"{prefix}{k}.")), None)
        if own is None and not key.startswith(codec.prefix):
            raise StoreError(f"a tensor {key!r} that is not of a {codec.peft_type} adapter", where=str(path / WEIGHTS))
        if not value.is_floating_point() and not any(w in key for w in WHOLE):
            raise StoreError(f"{key!r} is {value.dtype}, not floating point", where=str(path / WEIGHTS))
        tensors[own or key.removeprefix(codec.prefix)] = value
    source = Source(model, resolve.sites(model), config, tensors, where)
    with unfit(source):
        drafts = _drafts(source, codec)
    plan: Plan = drafts[0].method if len(drafts) == 1 else Sum(tuple(d.method for d in drafts))
    return join_drafts(source, plan, drafts, name, activate)


@contextlib.contextmanager
def unfit(source: Source) -> Iterator[None]:
    """What is wrong with a plan or a site within the block is wrong with the file."""
    try:
        yield
    except (StoreError, AdapterError):  # the name is taken: no fault of the file
        raise
    except VeneerError as e:
        raise source.fail(f"the adapter cannot be attached: {e.what}", e.fix) from e


def join_drafts(source: Source, plan: Plan, drafts: list[Draft], name: str, activate: bool) -> Adapter:
    """Attach `plan`, whose terms are the methods of `drafts` in their order, with the tensors of these."""
    with unfit(source):
        adapter = attach(source.model, plan, name=name, activate=False)
    state = state_of(source.model)
    try:
        _fill(source, state.adapters[name].parts, drafts)
    except BaseException:
        detach(source.model, name)
        raise
    if activate:
        state.active = (name,)
    state.refresh()
    return adapter


def _drafts(source: Source, codec: Codec) -> list[Draft]:
    """The methods that the file becomes; every tensor of it has its place in one of them."""
    check_fields(source, codec.fields)
    drafts = [*codec.read(source)]
    if not drafts:
        raise source.fail(f"there is no tensor of {codec.peft_type} in {WEIGHTS}", "The file is not whole; take another copy")
    drafts += whole.rest(source)
    for draft in drafts:  # PEFT acts at the module that it names, and not at those that hold the same tensor
        if shared(source.model, draft.values):
            if any(f.name == "tied" for f in fields(draft.method)):  # type: ignore[arg-type]
                draft.method = replace(draft.method, tied=False)  # type: ignore[type-var]
            elif any(s.port == "weight" for s in draft.values):
                raise source.fail(f"{draft.method.name} changes a tied tensor at one of its modules, which cannot be done here")
    if source.tensors:
        raise source.fail(f"there is a tensor {next(iter(source.tensors))!r}, which {codec.peft_type} does not have")
    return drafts


def _fill(source: Source, parts: list[Part], drafts: list[Draft]) -> None:
    """Give every part its tensors."""
    with torch.no_grad():
        for part in parts:
            draft = drafts[part.term]
            given = draft.values.get(part.site, {}) if part.acts else draft.bank
            if hasattr(part, "unfold"):
                part.unfold(given)
            buffers = {k: b for k, b in part.named_buffers() if k in given}
            for key, own in [*part.named_parameters(), *buffers.items()]:
                if key not in given or given[key].shape != own.shape:
                    there = list(given[key].shape) if key in given else "none"
                    raise source.fail(f"{part.site.path!r} needs {key!r} of shape {list(own.shape)}, and the file has {there}")
                own.copy_(given[key])
            if flaw := part.flaw():
                raise source.fail(f"{part.site.path!r}: {flaw}", "The file is damaged; take another copy")
        for part in parts:
            part.derive()


# -- writing ----------------------------------------------------------------------------------------------------------
def save_peft(model: nn.Module, path: Path, record: Record) -> Path:
    """Write `record` as PEFT's files: at `path` for the adapter 'default', in `path`/<name> for others. Returns where.

    Raises: CapabilityError for what PEFT cannot express: gates, stacks, methods it lacks, and mixtures of its types.
    """
    codec, parts = _codec(record)
    both = next((p for p in record.parts if p.echoes), None)
    if both is not None:
        raise CapabilityError(
            f"{both.site.path!r} holds the tensor of {both.echoes[0].site.path!r}: {both.method_name} acts at both here, and at one of them in PEFT",
            fix="Save it in the native format, or train it with tied=False",
        )
    fields, tensors = codec.write(model, parts, [t.method for t in record.plan.terms()])
    left = {id(p) for p in parts if f"{p.site.path}.ln_tuning_layers.{p.site.tensor}" in tensors or p.method_name != "full"}
    extra = [p for p in record.parts if id(p) not in left]
    saved: dict[str, Any] = {"modules_to_save": None}
    if extra:
        saved, more = whole.write_rest(model, extra)
        tensors = {**tensors, **more}
    config = {
        "peft_type": codec.peft_type, "task_type": task_of(model, tensors), "auto_mapping": None, "inference_mode": True, "revision": None,
        "base_model_name_or_path": str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None, **saved, **fields,
    }  # fmt: skip
    if soft.KEY in tensors and config["task_type"] is None:
        config["task_type"] = "FEATURE_EXTRACTION"  # a prompt needs one of PEFT's wrappers; this one wants no head
    folder = path if record.name == "default" else path / record.name
    out = {codec.roots.get(k.partition(".")[0], codec.prefix) + k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    write_folder(folder, dict(sorted(config.items())), out, (CONFIG, WEIGHTS))
    write_whole(folder / "README.md", _readme(record, config).encode())
    return folder


def _codec(record: Record) -> tuple[Codec, list[Part]]:
    """The codec for the one method of `record` that gives it its type, and that method's parts."""
    native = "Save it in the native format: vn.save(model, path)"
    if any(p.gate is not None for p in record.parts):
        raise CapabilityError(
            f"PEFT's format has no gates, and {record.name!r} has", fix=f"Settle them into constants first: vn.settle(model, batches), or: {native}"
        )
    if record.plan.depth() > 1:
        raise CapabilityError(f"PEFT's format has no stacks (a >> b), and {record.name!r} is one", fix=native)
    of = {m: c for c in CODECS for m in (c.method, *c.also)}
    methods = list(dict.fromkeys(p.method_name for p in record.parts))
    main = [m for m in methods if m != "full"] or ["full"]
    codec = next((of[m] for m in main if m in of), None)
    for m in main:
        if codec is None or (m not in of and m not in codec.beside):
            raise CapabilityError(f"PEFT's format has no {m!r}, which {record.name!r} uses", fix=native)
    main = [m for m in main if codec is not None and m not in codec.beside]
    if codec is None or len(main) > 1:
        raise CapabilityError(f"a PEFT file holds one method, and {record.name!r} mixes {' and '.join(main)}", fix=native)
    return codec, [p for p in record.parts if p.method_name in (codec.method, *codec.also, *codec.beside)]


def _readme(record: Record, config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    head = "---\nlibrary_name: peft\n" + (f"base_model: {base}\n" if base else "") + "---\n"
    kind = config["peft_type"]
    return f"{head}\nA {kind} adapter{f' for {base}' if base else ''}, in the format of Hugging Face PEFT.\n\nIts plan: `{record.plan.to_dict()}`\n"
