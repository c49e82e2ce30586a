"""Record the launches of a step once and replay them: as a CUDA graph, or as the calls themselves.

A recorded function must read and write the same memory at each replay and must not look at a tensor's values. On CUDA
a graph then launches all of its kernels at once, without Python. On other devices, the CPU in a GPU's place or a
pretend device, a replay calls the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Launch = Callable[[], object]


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
    """Records launches on one device. `launched` counts the replays of all graphs made here."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.launched = device, 0
        self._memory: Any = None  # of the first graph: all graphs of a device share it

    def record(self, launches: Sequence[Launch]) -> Graph:
        """Return a graph of the launches in order. On CUDA they run once for real before."""
        if self.device.type != "cuda":
            return _Counted(self, Calls(launches))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for launch in launches:  # compiles kernels and loads libraries, which a capture does not allow
                launch()
            stream.synchronize()
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        self._memory = self._memory or graph.pool()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return _Counted(self, graph)


class _Counted:
    """A graph whose replays are counted."""

    def __init__(self, recorder: Recorder, graph: Any) -> None:
        self._recorder, self._graph = recorder, graph

    def replay(self) -> None:
        self._recorder.launched += 1
        self._graph.replay()
