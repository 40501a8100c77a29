"""Answers that are written at each evaluation, and scored beside its loss: for tasks whose loss says little of them."""

from __future__ import annotations

from typing import Any

import torch

from ..calls import evaluating
from ..errors import ConfigError
from .fit import ran_out
from .together import gathered, processes, rank

MEASURES = {"exact": True, "rouge_l": True, "chrf": True}  # what `eval.generated.compared` gives, each with whether more is better
ROWS = 32  # where the configuration says only that there be some
SHOWN = 16  # of them, in the report


class Written:
    """Greedy answers to rows of the evaluation, evenly drawn, as `veneer predict` gives them, and their scores.

    transformers' `predict_with_generate` feeds a model the rows of training, which a decoder's answers stand in already, and
    trl's LogCompletionsCallback gives no scores to choose by; so the prompts are built by the task's own Answer.

    last  the answers of the last evaluation

    Raises: CapabilityError (a task that does not answer in text, rows without answers), ConfigError (a package is missing; no
    room for an answer), before anything is trained.
    """

    def __init__(self, p: Any) -> None:
        from ..eval.generated import check_writes, expected
        from ..serve.answers import ANSWERS
        from ..serve.writing import check_room

        config = p.config
        self.most = config.max_new_tokens
        self.answer: Any = ANSWERS[config.task](p.task)
        check_writes(self.answer, config.task, "eval_generate")
        there = p.encoded[1].rows
        count = min(len(there), ROWS if config.eval_generate is True else int(config.eval_generate))
        self.rows = [p.tables[1].rows[there[i * len(there) // count]] for i in range(count)]
        self.wanted = expected(self.answer, self.rows, "eval_generate")
        longest = self.answer.tokens(self.rows)["input_ids"].shape[1]
        check_room(p.model, longest, self.most, f"A smaller max_new_tokens than {self.most}, or shorter rows")
        self.last: list[str] = []

    def __call__(self, trainer: Any) -> dict[str, float]:
        """The scores of the model as it is now. Of several processes each writes its share, unless they must move in step.
        Raises: what a forward pass does where memory runs out, in all processes."""
        from ..eval.generated import compared

        if processes() == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            self.last = self.said(trainer, self.rows)
        else:
            mine: list[str] = []
            failure = None
            try:
                mine = self.said(trainer, self.rows[rank() :: processes()])
            except (RuntimeError, MemoryError) as e:
                failure = e
            failures = [f for f in gathered(failure and ran_out(failure)) if f is not None]
            if failures:  # all end alike, or those that go on would wait
                raise failure or (MemoryError() if all(failures) else RuntimeError("the evaluation failed in another process"))
            shares = gathered(mine)
            self.last = [shares[i % len(shares)][i // len(shares)] for i in range(len(self.rows))]
        return compared(self.last, self.wanted)

    def said(self, trainer: Any, rows: list[Any]) -> list[str]:
        size, out = trainer.args.per_device_eval_batch_size, []
        with evaluating(trainer.model), torch.no_grad():
            for at in range(0, len(rows), size):
                out += [a["text"] for a in self.answer(rows[at : at + size], max_new_tokens=self.most)]
        return out

    def samples(self) -> list[dict[str, str]]:
        """What the report shows of the last answers."""
        asked = [self.answer.asked(r) for r in self.rows[:SHOWN]]
        return [{"prompt": a, "answer": s.strip(), "truth": w} for a, s, w in zip(asked, self.last, self.wanted, strict=False)]


def measures(p: Any) -> dict[str, bool]:
    """What an evaluation of the run `p` gives, each with whether more is better."""
    return p.task.measures | (MEASURES if p.config.eval_generate else {})


def best_of(p: Any) -> tuple[str, bool]:
    """What the best checkpoint is chosen by, and whether more of it is better. Raises: ConfigError with the nearest."""
    from ..errors import did_you_mean

    known, name = measures(p), p.config.best_metric or p.task.best
    if name not in known:
        more = "eval_generate=true gives it" if name in MEASURES and p.config.eval_generate is False else did_you_mean(name, known)
        raise ConfigError(f"an evaluation of {p.config.task} gives no {name!r}", where="best_metric", fix=more)
    return name, known[name]
