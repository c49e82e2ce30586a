"""The order of a graph's work on several devices."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from qmix.model.gpu.graphs import Recorder, queue

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Stream:
    """A stream that notes what is queued on it in a list that all share."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"{self.name} marks")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def order(*work):
    log = []
    streams = {FIRST: Stream("first", log), SECOND: Stream("second", log)}
    queue([(device, lambda name=name: log.append(name)) for device, name in work], FIRST, streams, nullcontext)
    return log


def test_work_on_another_device_waits_for_what_is_before_and_is_waited_for():
    assert order((FIRST, "a"), (FIRST, "b")) == ["a", "b"]
    crossed = ["first marks", "second waits for first", "b", "c", "second marks", "first waits for second"]
    assert order((FIRST, "a"), (SECOND, "b"), (SECOND, "c")) == ["a", *crossed]
    assert order((FIRST, "a"), (SECOND, "b"), (SECOND, "c"), (FIRST, "d")) == ["a", *crossed, "d"]


def test_replays_are_counted():
    calls, cpu = [], torch.device("cpu")
    recorder = Recorder(cpu)
    graph = recorder.record([(cpu, lambda: calls.append("a")), (cpu, lambda: calls.append("b"))])
    assert calls == []
    graph.replay()
    graph.replay()
    assert (calls, recorder.launched) == (["a", "b", "a", "b"], 2)
