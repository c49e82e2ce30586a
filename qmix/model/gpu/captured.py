"""A step of a few tokens through a whole model: graphs on its GPUs, and the host's experts between them.

The layers on a GPU are cut into stages. A stage is one graph that ends with the routing of a layer whose experts are
not all resident. A second graph computes that layer's residents, while the host reads the routing and computes the
others; their results are added at the start of the next stage. Only such layers are waited for. A model whose experts
are all resident has one graph a step, over several GPUs where they can access each other. Layers on the CPU come first
and are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qmix.kernels.gpu.shapes import ExpertShape
from qmix.model.gpu.away import AwayExperts, Exchange
from qmix.model.gpu.devices import Device, reach_each_other
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

    @property
    def place(self) -> torch.device:
        """The GPU as torch knows it."""
        return self.device.device


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph, and what the host does behind it.

    `away` are the experts elsewhere of the layer whose routing the graph ends with, on the GPU of `part`; `residents`
    is the graph of the others. `crossing` copies the stream to the next GPU.
    """

    graph: Graph
    part: OnDevice
    residents: Graph | None = None
    away: AwayExperts | None = None
    crossing: Launch | None = None


class CapturedStep:
    """The stages of a step of `tokens` tokens over the GPUs of a model, in order."""

    def __init__(self, kernels: Kernels, eps: float, parts: Sequence[OnDevice], tokens: int, embeds: bool) -> None:
        """With `embeds` the step begins with the tokens' embeddings, otherwise with a stream that is given."""
        self.tokens, self.parts = tokens, parts
        made = _Stages(parts[0])
        for before, part in zip([None, *parts[:-1]], parts, strict=True):
            if before is not None:
                crossing = _call(_cross, before, part, tokens)
                if reach_each_other(before.device, part.device):
                    made.add(part, crossing)
                else:
                    made.end(part, crossing=crossing)
            step = DeviceStep(kernels, part.buffers, part.layers, part.ends, eps, tokens, part.staged)
            self._add(made, step, part, embeds and before is None)
        made.end(parts[-1])
        self.stages = made.found

    def _add(self, made: _Stages, step: DeviceStep, part: OnDevice, embeds: bool) -> None:
        """Add a GPU's part of the step."""
        made.add(part, *([step.embed, step.norm] if embeds else [step.norm]))
        for index, away in enumerate(part.away):
            made.add(part, _call(step.attend, index))
            mixture = _call(step.mixture, index)
            if away is None:
                made.add(part, mixture)
            else:
                made.add(part, _call(_send, step, part.exchange))
                residents = part.recorder.record([(part.place, mixture)]) if part.layers[index].tables else None
                made.end(part, residents=residents, away=away)
                made.add(part, _call(_receive, step, part.exchange), _call(step.arrived, index))
            made.add(part, _call(step.add, index))
        if part.ends.head is not None:
            made.add(part, step.choose)
        if self.tokens == 1:
            made.add(part, step.advance)

    def run(self) -> None:
        """Queue the whole step; returns when the last graph is queued."""
        copies: AbstractContextManager[object] = nullcontext()
        for stage in self.stages:
            with copies:
                stage.graph.replay()
            copies = nullcontext() if stage.away is None else self._away(stage, stage.away)
            if stage.crossing is not None:
                stage.crossing()

    def _away(self, stage: Stage, away: AwayExperts) -> AbstractContextManager[object]:
        """Compute a layer's experts, on the GPU and elsewhere."""
        assert stage.part.exchange is not None
        routed = stage.part.device.mark()
        if stage.residents is not None:
            stage.residents.replay()
        routed.wait()
        return away.compute(stage.part.exchange, self.tokens)


class _Stages:
    """Collects launches, and makes a graph of them where the host has something to do."""

    def __init__(self, first: OnDevice) -> None:
        self.found: list[Stage] = []
        self._recorder = first.recorder
        self._work: list[tuple[torch.device, Launch]] = []

    def add(self, part: OnDevice, *launches: Launch) -> None:
        self._work += [(part.place, launch) for launch in launches]

    def end(self, part: OnDevice, **host: Any) -> None:
        """End a stage, with what the host does behind it; the next one begins on the GPU of `part`."""
        self.found.append(Stage(self._recorder.record(self._work), part, **host))
        self._recorder, self._work = part.recorder, []


def _cross(before: OnDevice, part: OnDevice, tokens: int) -> None:
    """Copy the stream from one GPU to the next."""
    part.buffers.stream[:tokens].copy_(before.buffers.stream[:tokens], non_blocking=True)


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
