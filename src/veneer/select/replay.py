"""A race's training step as one CUDA graph: the launches of its thousands of small kernels cost the host nothing then.

    step(t):  rows t of a table of examples -> forward of all lanes -> backward -> each lane's clipping and AdamW

Examples, order, learning rates and losses are tables on the device, indexed by a counter that the graph moves on. The first
steps run as they are, which also lets libraries and optimisers set themselves up; then one is captured and replayed.
NVIDIA, "Accelerating PyTorch with CUDA Graphs" (2021), is the technique.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attach import state_of
from ..training import penalty
from .lanes import Lane

if TYPE_CHECKING:
    from .heats import Heats

WARM = 3  # steps before the capture, as torch's documentation has it


class Replay:
    """Training steps of `heat`, from the race's present one on, as long as its lanes and its batch size stay the same."""

    def __init__(self, race: Heats, heat: list[Lane]) -> None:
        self.race, self.heat = race, heat
        self.first, self.rows = race.step, race.order.size(race.step)
        last = heat[0].steps
        while race.order.size(last - 1) != self.rows:
            last -= 1
        device = race.rows.device
        self.table = race.rows.whole()
        self.order = torch.tensor([race.order.rows(s) for s in range(self.first, last)], device=device)
        self.rates = torch.tensor([[r for lane in heat for r in lane.rates(s)] for s in range(self.first, last)], device=device)
        self.losses = torch.zeros(last - self.first, len(heat), device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if self.order.is_cuda else None
        self.routing: Any = None
        for lane in heat:
            for group in lane.optimizer.param_groups:
                group["capturable"] = self.order.is_cuda

    def fits(self, heat: list[Lane], rows: int) -> bool:
        return self.done < len(self.order) and self.rows == rows and len(heat) == len(self.heat) and all(a is b for a, b in zip(heat, self.heat, strict=True))

    def close(self) -> None:
        """Give back the memory."""
        self.graph = None
        for lane in self.heat:
            lane.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step of every lane."""
        if self.graph is None:
            self.run()
        if self.graph is not None:
            self.graph.replay()
        for j, lane in enumerate(self.heat):
            lane.note(self.losses[self.done, j], self.rows)
        self.done += 1

    def run(self) -> None:
        """Take the step, or, after the first ones on a GPU, record it."""
        state = state_of(self.race.model)
        with self.race.in_force(self.heat, self.rows):
            # one routing for all steps: the row numbers that it works out are on the device before the recording
            self.routing = self.routing or state.frame.routing
            state.frame = replace(state.frame, routing=self.routing)
            if self.stream is None:
                self.body()
            elif self.done < WARM:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    self.body()
                torch.cuda.current_stream().wait_stream(self.stream)
            else:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.body()
                self.graph = graph

    def body(self) -> None:
        """The step in device operations alone."""
        chosen = self.order.index_select(0, self.at).squeeze(0)
        inputs = {k: v.index_select(0, chosen) for k, v in self.table.items()}
        labels = inputs.pop("labels")
        rates = list(self.rates.index_select(0, self.at).squeeze(0))
        for lane in self.heat:
            lane.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for logits in self.race.outputs(self.heat, inputs):
            total, count = self.race.loss(logits, labels)
            losses.append(total / count.clamp(min=1))
        more = [penalty(self.race.model, names=(lane.name,)) for lane in self.heat]
        torch.stack([a + b for a, b in zip(losses, more, strict=True)]).sum().backward()
        for lane in self.heat:
            n = len(lane.optimizer.param_groups)
            lane.update(rates[:n])
            rates = rates[n:]
        self.losses.index_copy_(0, self.at, torch.stack(losses).detach().float()[None])
        self.at += 1
