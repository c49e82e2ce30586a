"""Record the launches of a step once and replay them: as a CUDA graph, or as the calls themselves.

A recorded function must read and write the same memory at each replay and must not look at a tensor's values. On CUDA
a graph then launches all of its kernels at once, without Python. On other devices, the CPU in a GPU's place or a
pretend device, a replay calls the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch

Launch = Callable[[], object]
Work = Sequence[tuple[torch.device, Launch]]  # launches and their devices


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> object:
        """Queue the launches on the device."""


class Calls:
    """Launches that are made one by one."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._launches = tuple(launches)

    def replay(self) -> None:
        for launch in self._launches:
            launch()


class Recorder:
    """Records launches that begin on one device. `launched` counts the replays of all graphs made here."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.launched = device, 0
        self._memory: Any = None  # the first graph's: all graphs of a device share it

    def record(self, work: Work) -> Graph:
        """Return a graph of the launches in order. On CUDA they run once for real before.

        Launches on other devices are part of the same graph, which needs access from GPU to GPU.
        """
        if self.device.type != "cuda":
            return _Counted(self, Calls([launch for _, launch in work]))
        streams = {each: torch.cuda.Stream(each) for each in dict.fromkeys([*(each for each, _ in work), self.device])}
        graph = torch.cuda.CUDAGraph()
        with ExitStack() as current:  # this device last: its stream is captured
            for device, stream in streams.items():
                stream.wait_stream(torch.cuda.current_stream(device))
                current.enter_context(torch.cuda.stream(stream))
            current.enter_context(torch.cuda.stream(streams[self.device]))
            queue(work, self.device, streams)  # compiles kernels and loads libraries, which a capture does not allow
            streams[self.device].synchronize()
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                queue(work, self.device, streams)
            finally:
                graph.capture_end()
        self._memory = self._memory or graph.pool()
        for device, stream in streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        others = [device for device in streams if device != self.device]
        return _Counted(self, _Joined(graph, self.device, others) if others else graph)


def queue(
    work: Work,
    home: torch.device,
    streams: Mapping[torch.device, Any],
    on: Callable[[Any], AbstractContextManager[object]] = torch.cuda.stream,
) -> None:
    """Queue launches, each on its device's stream and after the one before; the last is waited for on `home`'s."""
    before = home
    for device, launch in work:
        if device != before:
            streams[device].wait_event(streams[before].record_event())
            before = device
        with on(streams[device]):
            launch()
    if before != home:
        streams[home].wait_event(streams[before].record_event())


class _Joined:
    """A graph that works on other devices, too: it begins after all that is queued there, and they wait for its end."""

    def __init__(self, graph: Any, home: torch.device, others: Sequence[torch.device]) -> None:
        self._graph, self._home, self._others = graph, home, others

    def replay(self) -> None:
        home = torch.cuda.current_stream(self._home)
        others = [torch.cuda.current_stream(device) for device in self._others]
        for stream in others:
            home.wait_event(stream.record_event())
        self._graph.replay()
        for stream in others:
            stream.wait_event(home.record_event())


class _Counted:
    """A graph whose replays are counted."""

    def __init__(self, recorder: Recorder, graph: Any) -> None:
        self._recorder, self._graph = recorder, graph

    def replay(self) -> None:
        self._recorder.launched += 1
        self._graph.replay()
