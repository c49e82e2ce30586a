"""Stages of a kernel in one call: pieces of a later stage wait until all of the earlier ones are done.

Threads draw pieces in order, and a piece waits for earlier ones only, which other threads have drawn and compute. So
nothing can wait for ever, whatever the number of threads. Who waits looks at the count of finished pieces for some 50
microseconds, then gives its core to other programs between looks: a thread that has lost its core to another program
is waited for without taking that program's core.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.vectors import I32, I64, VOID, Builder, Value, at, call

LOOKS = 1000  # before a thread gives its core away; a pause takes 40 to 140 cycles


def _pause(b: Builder) -> None:
    if platform.machine().lower() in ("x86_64", "amd64"):
        call(b, "llvm.x86.sse2.pause", VOID)


@intrinsic
def wait_for(context: object, done: Any, pieces: Any) -> tuple[Any, Callable[..., Any]]:
    """Return when the int64 at the address `done` is at least `pieces`; what those pieces wrote can then be read."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        address, pieces = arguments
        counter = at(b, address, 0, I64)
        looks = cgutils.alloca_once_value(b, ir.Constant(I64, 0))
        look, wait, ready = (b.append_basic_block(f"stage.{name}") for name in ("look", "wait", "ready"))
        b.branch(look)
        b.position_at_end(look)
        b.cbranch(b.icmp_signed(">=", b.load_atomic(counter, "acquire", 8), pieces), ready, wait)
        b.position_at_end(wait)
        count = b.load(looks)
        b.store(b.add(count, ir.Constant(I64, 1)), looks)
        with b.if_else(b.icmp_unsigned("<", count, ir.Constant(I64, LOOKS))) as (soon, late):
            with soon:
                _pause(b)
            with late:
                call(b, "sched_yield", I32)
        b.branch(look)
        b.position_at_end(ready)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def finish(context: object, done: Any) -> tuple[Any, Callable[..., Any]]:
    """Count a finished piece at the address `done`; what it wrote can be read by those who wait for it."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        b.atomic_rmw("add", at(b, arguments[0], 0, I64), ir.Constant(I64, 1), "release")
        return context.get_dummy_value()

    return types.void(types.int64), emit
