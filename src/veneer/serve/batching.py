"""Requests for different adapters, answered together: one batch on one base, each row with its own adapter."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter import route
from ..errors import AdapterError, CapabilityError, did_you_mean
from .opened import Opened
from .writing import GREEDY, check_room


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, the adapter that answers (None: the base), and how the answer is drawn."""

    ids: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int = 128
    temperature: float = 0.0
    answer: Future[list[int]] = field(default_factory=Future, compare=False)


class Batcher:
    """Gathers requests and generates for them in one batch, row by row with another adapter (vn.route).

    most    rows in a batch
    wait    seconds for which the first request of a batch waits for others

    `sizes` are those of the last batches, with the number of different adapters in each. Raises: CapabilityError for a model
    that generates nothing, or an adapter that cannot be routed to rows.
    """

    def __init__(self, opened: Opened, most: int = 16, wait: float = 0.01) -> None:
        if not getattr(opened.model, "can_generate", lambda: False)() or opened.tokenizer is None:
            raise CapabilityError(f"{type(opened.model).__name__} does not generate text", where=str(opened.folder), fix="Use it with veneer predict")
        for name in opened.names:
            with route(opened.model, [name]):
                pass
        self.opened, self.most, self.wait = opened, most, wait
        self.sizes: deque[tuple[int, int]] = deque(maxlen=1000)
        self._queue: queue.Queue[Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Future[list[int]]:
        """The answer's token ids, when they are there. Raises: AdapterError for an unknown adapter, DataError where prompt and
        answer are longer than the model."""
        if request.adapter is not None and request.adapter not in self.opened.names:
            raise AdapterError(f"no adapter called {request.adapter!r} is here", fix=did_you_mean(request.adapter, self.opened.names))
        check_room(self.opened.model, len(request.ids), request.max_new_tokens, "Ask for fewer tokens: max_tokens")
        self._queue.put(request)
        return request.answer

    def close(self) -> None:
        """Answer what is waiting, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting: list[Request] = []
        while True:
            if not waiting:
                first = self._queue.get()
                if first is None:
                    return
                waiting.append(first)
            over = self._gather(waiting)
            # rows of a batch are drawn alike; who is not like the first waits for the next
            batch = [r for r in waiting if r.temperature == waiting[0].temperature][: self.most]
            taken = {id(r) for r in batch}
            waiting = [r for r in waiting if id(r) not in taken]
            try:
                for request, ids in zip(batch, self.generate(batch), strict=True):
                    request.answer.set_result(ids)
            except BaseException as e:  # whoever asked learns of it, and the server goes on
                for request in batch:
                    request.answer.set_exception(e)
            if over:
                self._queue.put(None)

    def _gather(self, waiting: list[Request]) -> bool:
        """Add what comes within the wait; whether the end was asked for."""
        until = time.monotonic() + self.wait
        while len(waiting) < self.most:
            try:
                found = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return False
            if found is None:
                return True
            waiting.append(found)
        return False

    @torch.no_grad()
    def generate(self, batch: list[Request]) -> list[list[int]]:
        """The answers' token ids, up to and without the end-of-text token."""
        model, tools = self.opened.model, self.opened.tokenizer
        longest = max(len(r.ids) for r in batch)
        pad = tools.pad_token_id if tools.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (longest - len(r.ids)) + list(r.ids) for r in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(r.ids)) + [1] * len(r.ids) for r in batch], device=model.device)
        options: dict[str, Any] = {"do_sample": True, "temperature": batch[0].temperature} if batch[0].temperature > 0 else {"do_sample": False, **GREEDY}
        with route(model, [r.adapter for r in batch]):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(r.max_new_tokens for r in batch), pad_token_id=pad, **options)
        self.sizes.append((len(batch), len({r.adapter for r in batch})))
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {tools.eos_token_id}
        answers = []
        for row, request in zip(out[:, longest:].tolist(), batch, strict=True):
            stop = next((i for i, t in enumerate(row) if t in ends), len(row))
            answers.append(row[: min(stop, request.max_new_tokens)])
        return answers
