"""Open the devices of a plan, take memory on them, and copy to and from them.

A plan says "cpu" or "gpu:0". In a run "gpu:0" is torch's "cuda:0"; when a plan is verified without GPUs it is a pretend
device, and in tests of values it is the CPU itself. Streams, events and pinned memory exist with CUDA only: elsewhere
a copy is done when the call returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from qmix.errors import UsageError
from qmix.plan.device_memory import STAGED_RECORDS
from qmix.precision.memory import anonymous_memory
from qmix.units import plural

HOST = "cpu"
POLLED_SECONDS = 300e-6  # longer than a GPU takes to a layer's routing
PORTABLE = 1  # of CUDA's driver_types.h, cudaHostRegisterPortable: pinned for every GPU


class Allocator(Protocol):
    """Takes memory, uint8, on a device."""

    def __call__(self, nbytes: int, device: torch.device) -> torch.Tensor: ...


def take_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return `nbytes` of memory, uint8: on huge pages on the host, torch's on a GPU."""
    return anonymous_memory(nbytes) if device.type == HOST else torch.empty(nbytes, dtype=torch.uint8, device=device)


class Device:
    """A place of a plan: the host, or a GPU with a stream of its own for copies."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` on this device, itself if it is there. A copy from pinned memory may still be under way."""
        return tensor.to(self.device, non_blocking=True)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of uninitialised memory, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        """Return a mark behind the work queued so far."""
        return Mark(self)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros in main memory, pinned where this is a CUDA device."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.copies is not None)

    def wait(self) -> None:
        """Wait until all work queued on the device is done."""
        if self.copies is not None:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Return the bytes allocated here; 0 where CUDA does not count them."""
        return int(torch.cuda.memory_allocated(self.device)) if self.copies is not None else 0

    def peak(self) -> int:
        """Return the most bytes allocated here since `forget_peak`; 0 where CUDA does not count them."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.copies is not None else 0

    def limit(self, nbytes: int | None) -> None:
        """Let this process's torch take no more than `nbytes` beside what it holds already; None takes the limit away.

        At the limit torch's allocator gives back the freed blocks that it keeps, and then raises. Those of an earlier
        run are given back here.
        """
        if self.copies is None:
            return
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(self.device)[1]
        most = total if nbytes is None else min(total, torch.cuda.memory_reserved(self.device) + nbytes)
        torch.cuda.set_per_process_memory_fraction(most / total, self.device)

    def forget_peak(self) -> None:
        """Start a new peak from the bytes allocated now."""
        if self.copies is not None:
            torch.cuda.reset_peak_memory_stats(self.device)


class Mark:
    """A place in the work queued on a device."""

    def __init__(self, device: Device) -> None:
        self._event: Any = None
        if device.copies is not None:
            self._event = torch.cuda.current_stream(device.device).record_event()

    def wait(self) -> None:
        """Wait until the device gets there: at first it polls, because blocking costs tens of microseconds more.

        A query does not let go of Python's lock. Other threads, those of a server, must not wait for a whole token.
        """
        if self._event is None:
            return
        until = time.perf_counter() + POLLED_SECONDS
        while not self._event.query():
            if time.perf_counter() > until:
                self._event.synchronize()
                return


def reach_each_other(first: Device, second: Device) -> bool:
    """Return whether copies between two devices can be part of one CUDA graph: GPUs with access to each other."""
    if first.copies is None or second.copies is None:
        return True
    pairs = (first.device, second.device), (second.device, first.device)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in main memory, complete when the call returns."""
    return tensor.to(HOST)


def open_devices(names: Sequence[str], kind: str = "cuda") -> dict[str, Device]:
    """Return the devices of a plan by name, "cpu" and "gpu:N". `kind` is torch's name for the backend of its GPUs.

    Raises UsageError where the plan uses a GPU that this machine does not have.
    """
    found = {HOST: Device(HOST, torch.device(HOST))}
    for name in names:
        if name == HOST:
            continue
        index = int(name.removeprefix("gpu:"))
        if kind == "cuda" and index >= torch.cuda.device_count():
            raise UsageError(
                f"the plan uses {name}, and torch finds {plural(torch.cuda.device_count(), 'CUDA device')} here; "
                "make a plan for this machine, or install torch's build for CUDA"
            )
        found[name] = Device(name, torch.device(HOST if kind == HOST else f"{kind}:{index}"))
    return found


def pin(memory: torch.Tensor, devices: Sequence[Device]) -> Callable[[], None] | None:
    """Lock memory so that these GPUs can copy from it while Python goes on; return a function that unlocks it.

    If the system refuses, nothing is locked and the result is None: copies are then slower and block the caller, but
    still correct.
    """
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE)) != 0:
        with suppress(RuntimeError):  # CUDA keeps the error for the next kernel launch
            devices[0].upload(torch.zeros(1)).add_(1)
        return None
    address = memory.data_ptr()

    def undo() -> None:
        for device in devices:  # copies that a run left behind still read it
            device.wait()
        runtime.cudaHostUnregister(address)

    return undo


class Staged:
    """A record on its way to a device, in one of the staging buffers."""

    def __init__(self, staging: Staging, index: int, nbytes: int) -> None:
        self.staging, self.index = staging, index
        self.bytes = staging.buffers[index][:nbytes]
        self._arrived = staging.device.copies.record_event() if staging.device.copies is not None else None

    def wait(self) -> None:
        """Wait until the copy is done and its source may change."""
        if self._arrived is not None:
            self._arrived.synchronize()

    @contextmanager
    def in_use(self) -> Iterator[torch.Tensor]:
        """Give the bytes to work queued inside the block; afterwards the buffer may be filled again."""
        if self._arrived is None:
            yield self.bytes
            return
        stream = torch.cuda.current_stream(self.staging.device.device)
        stream.wait_event(self._arrived)
        yield self.bytes
        self.staging.used[self.index] = stream.record_event()


class Staging:
    """Buffers of `nbytes` on a device, filled in turn: one is filled while the one before is computed with."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.buffers = [device.empty(nbytes) for _ in range(STAGED_RECORDS)]
        self.used: list[Any] = [None] * STAGED_RECORDS  # events: the end of the work with a buffer's last content
        self._next = 0

    def copy(self, record: torch.Tensor, beside: Staged | None = None) -> Staged:
        """Begin to copy a record from main memory, after the work with the buffer's last content.

        The buffer of `beside`, whose work is not queued yet, is left alone.
        """
        index = self._next
        if beside is not None and beside.index == index:
            index = (index + 1) % STAGED_RECORDS
        self._next = (index + 1) % STAGED_RECORDS
        target = self.buffers[index][: len(record)]
        if self.device.copies is None:
            target.copy_(record)
            return Staged(self, index, len(record))
        with torch.cuda.stream(self.device.copies):
            if self.used[index] is not None:
                self.device.copies.wait_event(self.used[index])
            target.copy_(record, non_blocking=True)
            return Staged(self, index, len(record))
