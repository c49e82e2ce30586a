"""Run kernels on several threads: as many as torch uses, or as the calling thread has chosen.

A kernel takes one address, of int64 arguments. The first is a counter that starts at zero, from which each thread
draws the number of its next piece of work until none is left. A delayed thread delays no other. One thread computes
each piece in one way, so results do not depend on the number of threads.

The process has one team. Its threads are started with the first kernel that needs them, and sleep when there is
nothing to do. How they wait is in `workers`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qmix.kernels.cpu.addresses import call_at
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.futex import FUTEX
from qmix.kernels.cpu.threads import threads
from qmix.kernels.cpu.workers import (
    BLOCK,
    CALLER_SLEEPS,
    CALM,
    FINISHED,
    GATE,
    HELPERS,
    KERNEL,
    LIMIT,
    NUMBER,
    NUMBERS,
    OPEN,
    PATIENCE,
    SLEEPING,
    TEAM_BYTES,
    add,
    cycles,
    pause,
    read,
    replace,
    sleep,
    times_interrupted,
    wake,
    write,
)

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # called without the GIL


def run(kernel: int, *arguments: int) -> None:
    """Call the kernel at the address `kernel` on `threads()` threads, without the GIL."""
    block = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
    helpers = threads() - 1
    if helpers > 0 and FUTEX:
        _team().run(kernel, ctypes.addressof(block), helpers)
    else:
        _FUNCTION(kernel)(block)


class Team:
    """Threads that help the caller of a kernel. Daemon threads: they end with the process, and keep its memory."""

    def __init__(self) -> None:
        self._memory = np.zeros(TEAM_BYTES + 64, np.uint8)
        start = -self._memory.ctypes.data % 64
        self._shared = self._memory[start : start + TEAM_BYTES]
        self._address = self._shared.ctypes.data
        self._lock, self._started = threading.Lock(), 0
        self._run, self._help = _FUNCTION(_caller()), _FUNCTION(_helper())

    def run(self, kernel: int, block: int, helpers: int) -> None:
        """Run a kernel with up to `helpers` threads beside the calling one; alone while another caller has them."""
        if not self._lock.acquire(blocking=False):
            _FUNCTION(kernel)(block)
            return
        try:
            while self._started < helpers:
                name = f"qmix-team-{self._started + 1}"
                threading.Thread(target=self._join, name=name, daemon=True).start()
                self._started += 1
            self._shared[KERNEL : BLOCK + 8].view(np.int64)[:] = kernel, block
            self._shared[LIMIT : LIMIT + 4].view(np.int32)[0] = helpers
            self._run(self._address)
        finally:
            self._lock.release()

    def _join(self) -> None:
        """Help until the process ends. A bound method: `self` holds the memory that the thread looks at."""
        self._help(self._address)


@cache
def _team_of(process: int) -> Team:
    return Team()


def _team() -> Team:
    """Return the team of this process; a fork has none of its parent's threads."""
    return _team_of(os.getpid())


# Numba treats the variables of an enclosing function as constants.


@cache
def _caller() -> int:
    """Return the code that opens a kernel to the helpers, runs it too, and waits for those who came."""

    def run(team: Any) -> None:
        words = carray(team, TEAM_BYTES // 8)
        place = words.ctypes.data
        number = (read(place + GATE) // NUMBER + 1) % NUMBERS
        write(place + GATE, number * NUMBER + OPEN)
        sleeping = min(read(place + SLEEPING), read(place + LIMIT))
        if sleeping > 0:
            wake(place + GATE, sleeping)
        call_at(words[KERNEL // 8], words[BLOCK // 8])
        add(place + GATE, -OPEN)
        began = cycles()
        while read(place + GATE) & HELPERS:
            if cycles() - began < PATIENCE:
                pause()
                continue
            write(place + CALLER_SLEEPS, 1)
            finished = read(place + FINISHED)
            if read(place + GATE) & HELPERS:
                sleep(place + FINISHED, finished)
            write(place + CALLER_SLEEPS, 0)

    return compiled_address(run)


@cache
def _helper() -> int:
    """Return the code of a helper, which never ends."""

    def help_kernels(team: Any) -> None:
        words = carray(team, TEAM_BYTES // 8)
        place = words.ctypes.data
        done, calm, interrupted, began = -1, CALM, times_interrupted(), cycles()
        while True:
            gate = read(place + GATE)
            number = gate // NUMBER
            if gate & OPEN and number != done:
                if gate & HELPERS >= read(place + LIMIT):
                    done = number
                elif replace(place + GATE, gate, gate + 1):
                    done = number
                    call_at(words[KERNEL // 8], words[BLOCK // 8])
                    if (add(place + GATE, -1) - 1) & (OPEN | HELPERS) == 0:
                        add(place + FINISHED, 1)
                        if read(place + CALLER_SLEEPS):
                            wake(place + FINISHED, 1)
                    now = times_interrupted()
                    calm = calm + 1 if now == interrupted else 0
                    interrupted, began = now, cycles()
            elif calm >= CALM and cycles() - began < PATIENCE:
                pause()
            else:
                add(place + SLEEPING, 1)
                sleep(place + GATE, gate)
                add(place + SLEEPING, -1)
                began = cycles()

    return compiled_address(help_kernels)
