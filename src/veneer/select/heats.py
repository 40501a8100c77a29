"""How a race runs: steps, evaluations and rungs of the lanes that are still in it, in as few forwards as can be."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import activate, active, route
from ..errors import CapabilityError
from ..training import penalty
from .lanes import Lane
from .replay import Replay
from .rows import Judge, Loss, Order, Rows


def gpus(model: nn.Module) -> list[torch.device]:
    """The GPU that the model is on, if it is on one."""
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


class Heats:
    """A race while it runs."""

    def __init__(
        self, model: nn.Module, lanes: list[Lane], rows: Rows, evaluate: Any, order: Order, loss: Loss, judge: Judge,
        eval_batch: int, together: bool, max_rows: int | None, best: bool, graph: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.lanes, self.rows, self.evaluate, self.order = model, lanes, rows, evaluate, order
        self.loss, self.judge, self.eval_batch, self.together, self.max_rows, self.best = loss, judge, eval_batch, together, max_rows, best
        self.step, self.seconds, self.graph = 0, 0.0, graph
        self.replays: list[Replay] = []
        self.eager = not gpus(model)  # on a GPU losses are fetched now and then, since each fetch waits for it
        self.probe()

    @property
    def running(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.running]

    def probe(self) -> None:
        """Find the candidates that cannot be routed: their methods say so, or act on a state that all rows share."""
        inputs, _ = self.rows.batch([0])
        wide = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
        for lane in self.lanes:
            try:
                with torch.no_grad(), route(self.model, [lane.name, None]):
                    self.model(**wide)
            except CapabilityError as e:
                lane.record.together, lane.record.note = False, f"run alone: {e.what}"

    def go(self, settings: dict[str, Any], every: int | None, rungs: dict[int, int], folder: str | Path | None, save_every: int | None, on_step: Any) -> None:
        from .checkpoint import load, save

        steps = settings["steps"]
        if folder is not None:
            load(Path(folder), self, settings)
        training = {m: m.training for m in self.model.modules()}
        began, before = time.perf_counter(), self.seconds
        try:
            while self.step < steps and self.running:
                self.train_step()
                due = self.step in rungs or self.step == steps or (every is not None and self.step % every == 0)
                if due:
                    self.judge_all()
                    self.halve(rungs.get(self.step))
                self.seconds = before + time.perf_counter() - began
                if folder is not None and (due if save_every is None else self.step % save_every == 0 or self.step == steps):
                    self.settle()
                    save(Path(folder), self, settings)
                if on_step is not None:
                    on_step(self.step, {x.name: x.record for x in self.lanes})
        finally:
            self.keep([])
            for m, t in training.items():
                m.training = t
        for lane in self.running:
            lane.end("finished")
        if folder is not None:
            save(Path(folder), self, settings)

    def heats(self, rows: int) -> list[list[Lane]]:
        """The lanes that share a forward: those that can, as many as `max_rows` allows."""
        shared = [x for x in self.running if x.record.together and self.together]
        alone = [[x] for x in self.running if not (x.record.together and self.together)]
        each = max(1, len(shared) if self.max_rows is None else self.max_rows // rows)
        kinds = ([x for x in shared if x.steady], [x for x in shared if not x.steady]) if self.graph else (shared,)
        return [own[i : i + each] for own in kinds for i in range(0, len(own), each)] + alone

    @contextlib.contextmanager
    def in_force(self, heat: list[Lane], rows: int) -> Iterator[None]:
        if len(heat) == 1:
            if active(self.model) != (heat[0].name,):
                activate(self.model, heat[0].name)
            yield
        else:
            with route(self.model, [x.name for x in heat for _ in range(rows)]):
                yield

    def logits(self, heat: list[Lane], inputs: dict[str, Tensor], n: int) -> list[Tensor]:
        """Each lane's logits for the same n rows."""
        with self.in_force(heat, n):
            return self.outputs(heat, inputs)

    def outputs(self, heat: list[Lane], inputs: dict[str, Tensor]) -> list[Tensor]:
        """The same with the routing in force already."""
        k = len(heat)
        out = self.model(**(inputs if k == 1 else {key: v.repeat(k, *[1] * (v.dim() - 1)) for key, v in inputs.items()}))
        logits = out if isinstance(out, Tensor) else out["logits"] if hasattr(out, "keys") else out[0]
        return list(logits.split(logits.shape[0] // k))

    def train_step(self) -> None:
        self.model.train()
        n = self.order.size(self.step)
        heats = self.heats(n)
        self.keep([r for r in self.replays if any(r.fits(heat, n) for heat in heats)])
        inputs, labels = {}, None
        for heat in heats:
            begin = time.perf_counter()
            if self.graph and all(lane.steady for lane in heat):
                self.replay(heat, n).step()
                self.share(heat, begin)
                continue
            if labels is None:
                inputs, labels = self.rows.batch(self.order.rows(self.step))
            losses = []
            for logits in self.logits(heat, inputs, n):
                total, count = self.loss(logits, labels)
                losses.append(total / count.clamp(min=1))
            terms = [loss + penalty(self.model, names=(lane.name,)) for lane, loss in zip(heat, losses, strict=True)]
            # the sum's gradient with respect to each loss is 1, also where another is NaN
            torch.stack(terms).sum().backward()
            for lane, loss in zip(heat, losses, strict=True):
                lane.step(loss, n)
            self.share(heat, begin)
        self.step += 1
        if self.eager or self.step % 20 == 0:
            self.settle()

    def replay(self, heat: list[Lane], n: int) -> Replay:
        """The graph of this heat's steps."""
        found = next((r for r in self.replays if r.fits(heat, n)), None)
        if found is None:
            found = Replay(self, heat)
            self.replays.append(found)
        return found

    def keep(self, replays: list[Replay]) -> None:
        for r in self.replays:
            if r not in replays:
                r.close()
        self.replays = replays

    def settle(self) -> None:
        for lane in self.running:
            lane.settle()

    def judge_all(self) -> None:
        """Score every running candidate."""
        self.settle()
        self.model.eval()
        with torch.no_grad():
            for heat in self.heats(self.eval_batch):
                begin = time.perf_counter()
                if isinstance(self.evaluate, Rows):
                    scores = self.scores(heat)
                else:
                    scores = []
                    for lane in heat:
                        with self.in_force([lane], 0):
                            scores.append(float(self.evaluate(self.model)))
                for lane, score in zip(heat, scores, strict=True):
                    lane.scored(score, self.best)
                self.share(heat, begin)

    def scores(self, heat: list[Lane]) -> list[float]:
        found: list[list[Tensor]] = [[] for _ in heat]
        truth: list[Tensor] = []
        for start in range(0, len(self.evaluate), self.eval_batch):
            inputs, labels = self.evaluate.batch(range(start, min(start + self.eval_batch, len(self.evaluate))))
            truth.append(labels)
            for mine, logits in zip(found, self.logits(heat, inputs, labels.shape[0]), strict=True):
                mine.append(logits)
        return [self.judge.score(mine, truth) for mine in found]

    def halve(self, survivors: int | None) -> None:
        if survivors is None:
            return
        ranked = sorted(self.running, key=lambda x: x.record.scores[-1][1], reverse=True)
        for place, lane in enumerate(ranked[survivors:], survivors + 1):
            lane.end("dropped", f"place {place} of {len(ranked)} at step {self.step}, {survivors} go on")

    def share(self, heat: list[Lane], begin: float) -> None:
        each = (time.perf_counter() - begin) / len(heat)
        for lane in heat:
            lane.record.seconds += each
