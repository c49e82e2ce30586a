"""A step of a few tokens through a whole model: graphs on its GPUs, and the host's experts between them.

The layers on a GPU are cut into stages. A stage is one graph that ends with the routing of a layer whose experts are
not all resident. A second graph computes that layer's residents, while the host reads the routing and computes the
others; their results are added at the start of the next stage. So a GPU with all experts has one graph a step, and
only layers with experts elsewhere are waited for. Layers on the CPU come first and are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qmix.kernels.gpu.shapes import ExpertShape
from qmix.model.gpu.away import AwayExperts, Exchange
from qmix.model.gpu.devices import Device
from qmix.model.gpu.graphs import Graph, Launch, Recorder
from qmix.model.gpu.kernels import Kernels
from qmix.model.gpu.step import DeviceStep, StepBuffers, StepEnds, StepLayer


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A GPU's part of a model: its layers [first, ...), memory, and the experts elsewhere of each layer, or None."""

    device: Device
    first: int
    layers: Sequence[StepLayer]
    away: Sequence[AwayExperts | None]
    ends: StepEnds
    buffers: StepBuffers
    staged: dict[ExpertShape, torch.Tensor]
    exchange: Exchange | None
    recorder: Recorder


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph, and at its end a layer whose experts are not all resident, with the graph of those that are."""

    device: Device
    graph: Graph
    residents: Graph | None = None
    away: AwayExperts | None = None


class CapturedStep:
    """The stages of a step of `tokens` tokens over the GPUs of a model, in order."""

    def __init__(self, kernels: Kernels, eps: float, parts: Sequence[OnDevice], tokens: int, embeds: bool) -> None:
        """With `embeds` the step begins with the tokens' embeddings, otherwise with a stream that is given."""
        self.tokens, self.parts = tokens, parts
        self.stages: list[list[Stage]] = []
        for part in parts:
            step = DeviceStep(kernels, part.buffers, part.layers, part.ends, eps, tokens, part.staged)
            self.stages.append(self._stages(step, part, embeds and part is parts[0]))

    def _stages(self, step: DeviceStep, part: OnDevice, embeds: bool) -> list[Stage]:
        stages: list[Stage] = []
        work: list[Launch] = [step.embed, step.norm] if embeds else [step.norm]
        for index, away in enumerate(part.away):
            work.append(_call(step.attend, index))
            if away is None:
                work.append(_call(step.mixture, index))
            else:
                work.append(_call(_send, step, part.exchange))
                mixture = part.recorder.record([_call(step.mixture, index)]) if part.layers[index].tables else None
                stages.append(Stage(part.device, part.recorder.record(work), mixture, away))
                work = [_call(_receive, step, part.exchange), _call(step.arrived, index)]
            work.append(_call(step.add, index))
        if part.ends.head is not None:
            work.append(step.choose)
        if self.tokens == 1:
            work.append(step.advance)
        return [*stages, Stage(part.device, part.recorder.record(work))]

    def run(self) -> None:
        """Queue the whole step; returns when the last graph is queued."""
        before: OnDevice | None = None
        for part, stages in zip(self.parts, self.stages, strict=True):
            if before is not None:
                part.buffers.stream[: self.tokens].copy_(before.buffers.stream[: self.tokens], non_blocking=True)
            copies: AbstractContextManager[object] = nullcontext()
            for stage in stages:
                with copies:
                    stage.graph.replay()
                copies = self._away(stage, part)
            before = part

    def _away(self, stage: Stage, part: OnDevice) -> AbstractContextManager[object]:
        """Compute a layer's experts, on the GPU and elsewhere."""
        if stage.away is None:
            return nullcontext()
        assert part.exchange is not None
        routed = part.device.mark()
        if stage.residents is not None:
            stage.residents.replay()
        routed.wait()
        return stage.away.compute(part.exchange, self.tokens)


def _send(step: DeviceStep, exchange: Exchange) -> None:
    """Copy the routing and the normed stream to main memory."""
    exchange.ids[: step.tokens].copy_(step.ids, non_blocking=True)
    exchange.x[: step.tokens].copy_(step.normed, non_blocking=True)


def _receive(step: DeviceStep, exchange: Exchange) -> None:
    """Copy the host's results, and the addresses of the experts that it copied."""
    step.away.copy_(exchange.results[: len(step.away)], non_blocking=True)
    for shape, addresses in step.staged.items():
        addresses.copy_(exchange.staged[shape], non_blocking=True)


def _call(function: Any, *arguments: Any) -> Launch:
    return lambda: function(*arguments)
