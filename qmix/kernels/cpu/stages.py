"""Stages of a kernel in one call: pieces of a later stage wait until all of the earlier ones are done.

Threads draw pieces in order, and a piece waits for earlier ones only, which other threads have drawn and compute. So
nothing can wait for ever, whatever the number of threads. A thread that waits looks at the count of finished pieces
for 50 to 100 microseconds, longer than most pieces take, and then sleeps until the stage is done (futex): a thread that
lost its core to another program is waited for without taking that program's core. Giving the core away between looks
(sched_yield) is no substitute: another program then takes it for whole time slices, once a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.futex import WAIT, WAKE, futex, pause_core
from qmix.kernels.cpu.vectors import I64, Builder, Value, at

LOOKS = 2000  # before a thread sleeps; a pause takes 40 to 140 cycles


@intrinsic
def wait_for(context: object, done: Any, pieces: Any) -> tuple[Any, Callable[..., Any]]:
    """Return when the int64 at the address `done` is at least `pieces`; what those pieces wrote can then be read."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        address, pieces = arguments
        counter = at(b, address, 0, I64)
        looks = cgutils.alloca_once_value(b, ir.Constant(I64, 0))
        b.store(ir.Constant(I64, 0), looks)
        look, wait, ready = (b.append_basic_block(f"stage.{name}") for name in ("look", "wait", "ready"))
        b.branch(look)
        b.position_at_end(look)
        found = b.load_atomic(counter, "acquire", 8)
        b.cbranch(b.icmp_signed(">=", found, pieces), ready, wait)
        b.position_at_end(wait)
        count = b.load(looks)
        b.store(b.add(count, ir.Constant(I64, 1)), looks)
        with b.if_else(b.icmp_unsigned("<", count, ir.Constant(I64, LOOKS))) as (soon, late):
            with soon:
                pause_core(b)
            with late:
                futex(b, address, WAIT, found)
        b.branch(look)
        b.position_at_end(ready)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def finish(context: object, done: Any, pieces: Any) -> tuple[Any, Callable[..., Any]]:
    """Count a finished piece at the address `done`; what it wrote can be read by those who wait for it.

    `pieces` is the count with which its stage is done; then those who sleep are woken.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        address, pieces = arguments
        before = b.atomic_rmw("add", at(b, address, 0, I64), ir.Constant(I64, 1), "acq_rel")
        with b.if_then(b.icmp_signed("==", b.add(before, ir.Constant(I64, 1)), pieces)):
            futex(b, address, WAKE, ir.Constant(I64, 2**31 - 1))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit
