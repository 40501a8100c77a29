"""Direct preference optimisation, on trl."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ...data.chat import IGNORE, by_spans, render, set_template
from ...data.formats import BadRow
from ...errors import CapabilityError, ConfigError
from .base import Task


class Preference(Task):
    """Make the chosen answer y more likely than the rejected one z, as far as the base allows (Rafailov et al. 2023):

        loss = -log σ( β [log π(y|x) - log π₀(y|x)] - β [log π(z|x) - log π₀(z|x)] )

    π₀ is the base itself: its log-probabilities are computed once, with the adapter off, so no second model is kept.
    Messages are rendered in the tokenizer's chat template; plain texts are joined as they are. trl's DPOTrainer trains.
    """

    name = "dpo"
    auto = "AutoModelForCausalLM"
    formats = ("preference",)
    measures = {"loss": False, "rewards/accuracies": True, "rewards/margins": True}

    def ready(self) -> None:
        if find_spec("trl") is None:
            raise ConfigError("the package 'trl' is not installed", where="task=dpo", fix='pip install "veneer[trl]"')
        if not self.tools.is_fast:
            raise ConfigError(
                "the tokenizer gives no offsets, which the loss mask needs", where="model", fix="Use a model with a fast tokenizer (tokenizer.json)"
            )
        if self.config.chat_template:
            set_template(self.tools, self.config.chat_template)

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        out: list[dict[str, Any] | BadRow] = []
        for row in rows:
            try:
                out.append(self.one(row))
            except BadRow as bad:
                out.append(bad)
        return out

    def one(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if chosen == rejected:
            raise BadRow("the chosen and the rejected answer are the same")
        if prompt is None:
            if type(chosen) is not type(rejected):
                raise BadRow("one answer is a text and the other a list of messages")
            n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not prompt or not chosen or not rejected:
            raise BadRow("nothing is left of the prompt or of an answer", "Give the prompt in a column of its own: data.columns.prompt")
        (a, la), (b, lb) = self.sides(prompt, chosen), self.sides(prompt, rejected)
        start = min(_start(la), _start(lb), next((i for i, (s, t) in enumerate(zip(a, b, strict=False)) if s != t), min(len(a), len(b))))
        first, second = a[start:], b[start:]
        if start >= self.longest:
            raise BadRow(f"the prompt alone has {start} tokens, and {self.longest} are kept", "Raise max_length, or skip such rows: data.on_error=skip")
        if not first or not second:
            raise BadRow("an answer has no token of its own")
        return {"prompt_ids": a[:start], "chosen_ids": first, "rejected_ids": second, "length": max(len(a), len(b))}

    def sides(self, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
        """Ids and labels of a prompt with an answer."""
        if isinstance(prompt, str) and isinstance(answer, str):
            return by_spans(self.tools, prompt + answer, [(len(prompt), len(prompt + answer))], special=True)
        if not self.tools.chat_template:
            raise ConfigError(
                "the rows are conversations, and the tokenizer has no chat template", where="chat_template", fix="chat_template=chatml, or a file"
            )
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        before, whole = render(self.tools, asked, prompt=True), render(self.tools, [*asked, *said])
        if not whole.startswith(before):
            raise BadRow("the chat template renders the prompt otherwise when an answer follows", "Use another template: chat_template=FILE")
        return by_spans(self.tools, whole, [(len(before), len(whole.rstrip()))], special=False)

    def collator(self) -> Any:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return DataCollatorForPreference(pad_token_id=self.tools.pad_token_id, max_length=self.longest)

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {k: batch[k] for k in ("input_ids", "attention_mask")}

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        answers = [(f"\n{mark} " + self.tools.decode(row[key]), True) for mark, key in (("+", "chosen_ids"), ("-", "rejected_ids"))]
        return [(self.tools.decode(row["prompt_ids"]), False), *answers]

    def trainer(self) -> type:
        from trl import DPOTrainer

        from ...adapter import disabled
        from ...attach import state_of
        from ..together import gathered
        from ..trainer import AdapterRuns

        state = state_of(self.model)
        if any(part.site.role == "head" for name in state.active for part in state.adapters[name].parts):
            raise CapabilityError("trl computes its log-probabilities from the head's own weight, so a part on the head would never train", fix="Leave it out")

        class PreferenceTrainer(AdapterRuns, DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset  # has its ids already

            def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                own = dataset._get_cache_file_path
                dataset._get_cache_file_path = lambda key: gathered(own(key))[0]  # the first process writes what all read
                with disabled(self.model):
                    return super()._precompute_ref_logps(dataset, *args, **kwargs)

            def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...

        return PreferenceTrainer

    def arguments(self) -> tuple[type, dict[str, Any]]:
        from trl import DPOConfig

        return DPOConfig, {"beta": self.config.beta, "precompute_ref_log_probs": True, "max_length": self.longest}


def _start(labels: list[int]) -> int:
    return next((i for i, v in enumerate(labels) if v != IGNORE), len(labels))
