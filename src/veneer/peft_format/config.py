"""The fields of adapter_config.json: which are read, which say nothing about the function, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import StoreError, did_you_mean
from ..methods.base import Method
from ..plan import whole
from ..sites import Site

# Fields that change nothing once the weights are there: origin, initialisation, and settings of parts that are off by
# default (a part that is on has a field of its own, which is refused).
HARMLESS = frozenset(
    "peft_type task_type base_model_name_or_path revision auto_mapping inference_mode peft_version modules_to_save"
    " target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config loftq_config"
    " eva_config corda_config lora_ga_config init_lora_weights init_ia3_weights init_weights ensure_weight_tying"
    " prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
    " num_layers num_attention_heads token_dim num_virtual_tokens num_transformer_submodules encoder_hidden_size".split()
)
FEATURES = frozenset(
    "use_dora use_qalora use_bdlora layer_replication trainable_token_indices lora_bias alora_invocation_tokens arrow_config"
    " monteclora_config kasa_config velora_config megatron_config".split()
)
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# PEFT's task types, each with transformers' class that has such a head
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# the modules that PEFT, told these tasks, wants to find in the file
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def task_of(model: nn.Module, saved: Iterable[str]) -> str | None:
    """PEFT's task_type, which its loader takes the wrapper from; only transformers' class names carry it.

    A task whose head is not among the tensors `saved` is left out: the loader would miss it.
    """
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    tails = tuple(f".{h}" for h in HEADS.get(task or "", ()))
    heads = [p for p, _ in model.named_modules() if f".{p}".endswith(tails)] if tails else []
    needed = {f"{h}.{n}" for h in heads for n, _ in model.get_submodule(h).named_parameters() if "_veneer" not in n}
    return None if needed - set(saved) else task


# types that are no deviation from a frozen base at chosen sites: why, and the way out
UNREAD = {
    "XLORA": (
        "its router reads the last hidden state of a first run of the whole base, so every call is two, without a key/value cache; and the file holds"
        " the router alone, whose LoRAs lie elsewhere",
        "Load each LoRA, and train a router over them here: vn.mixture(vn.use('a'), vn.use('b'))",
    ),
    "SHADOW": (
        "it runs a second transformer beside the base, with a key/value cache of its own, whose state goes from layer to layer along with the base's",
        "Use it with PEFT; a small network beside the base, without gradients into it, is vn.Ladder",
    ),
}

_NESTED = re.compile(r"[+*}][^()]*\)+[+*{]")


@dataclass
class Source:
    """A file that is being read: its configuration, its tensors (a codec takes out what it uses), and the model."""

    model: nn.Module
    sites: list[Site]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str
    by_path: dict[tuple[str, str], list[Site]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for s in self.sites:
            self.by_path.setdefault((s.port, s.path), []).append(s)

    def fail(self, what: str, fix: str = "") -> StoreError:
        return StoreError(what, where=self.where, fix=fix)

    def whole(self, key: str, default: int | None = None) -> int:
        """A field that is a whole number of at least 1."""
        return self.whole_of(key, self.config.get(key, default))

    def whole_of(self, key: str, value: Any) -> int:
        if not whole(value):
            raise self.fail(f"{key} must be a whole number of at least 1, not {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        """A field that is a whole number of at least 0."""
        value = self.config.get(key, default)
        if not whole(value, 0):
            raise self.fail(f"{key} must be a whole number of at least 0, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self.finite(key, self.config.get(key, default))

    def finite(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
            raise self.fail(f"{key} must be a finite number, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, not {value!r}")
        return bool(value)

    def regex(self, key: str, text: str) -> re.Pattern[str]:
        """`text`, which stands in the field `key`, as a pattern; one that could run for ever on a short name is refused."""
        try:
            if len(text) > 10_000 or _NESTED.search(text):
                raise re.error("repetition within repetition")
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as e:
            raise self.fail(f"{key} has {text[:80]!r}, which is no regular expression: {e}") from None

    def table(self, key: str) -> dict[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.fail(f"{key} must be a mapping, not {value!r}")
        return value

    def names(self, key: str) -> list[str]:
        """A field that is a list of module names, or one regular expression or name (then a list of one)."""
        value = self.config.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.fail(f"{key} must be a list of module names, not {value!r}")
        return value


@dataclass
class Draft:
    """One method of the plan that a file becomes, the tensors of each of its sites, name -> value, and those of its bank."""

    method: Method
    values: dict[Site, dict[str, Tensor]] = field(default_factory=dict)
    bank: dict[str, Tensor] = field(default_factory=dict)


def check_fields(source: Source, used: Iterable[str]) -> None:
    """Refuse every field that might change the function and that nobody reads: one that is set and not known here."""
    known = HARMLESS | set(used)
    for key, value in source.config.items():
        if key in known or value is None or value is False or value == [] or value == {} or value == "":
            continue
        ptype = source.config["peft_type"]
        fix = f"Without {key} it could be: merge it with PEFT, or export a plain {ptype}" if key in FEATURES else did_you_mean(key, known)
        raise source.fail(f"{ptype} with {key}={value!r} cannot be read here, and leaving it out would change the function", fix)


INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def check_start(source: Source) -> None:
    """Some initialisations rewrite the base's weights too (PiSSA, OLoRA, LoftQ, …): the base given here lacks that."""
    init = source.config.get("init_lora_weights", True)
    if init not in INITS:
        raise source.fail(
            f"init_lora_weights={init!r} changes the base's weights, so the adapter does not fit the base itself",
            "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
