"""Threads that help with a kernel, compiled: they wait for a kernel, run it beside the caller, and wait again.

A barrier waits for every thread. Beside other programs a thread may stand still for milliseconds, and with it the
barrier. So nothing here waits for a thread that has not begun: the caller runs the kernel itself, whoever comes helps,
and the caller only waits for the threads that are at work when no piece is left. The team shrinks to the cores that the
machine leaves it.

A thread that waits first looks for a new kernel again and again, which takes it over within a microsecond, and then
sleeps (futex). It looks for PATIENCE cycles while it had its core to itself, and not at all after the system took the
core from it for another program, until it has had the core for CALM kernels.

    offset  bytes  the team's memory, in four cache lines
    0       4      gate: number of the kernel (15 bits), 1 bit if it is open to helpers, number of helpers at work
    64      4      sleeping helpers
    128     4      finished: changes when the last helper leaves a closed kernel
    132     4      1 while the caller sleeps until then
    192     8      address of the kernel
    200     8      address of its block of arguments
    208     4      most helpers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.futex import WAIT, WAKE, futex, pause_core
from qmix.kernels.cpu.vectors import I8, I32, I64, Builder, Value, at

GATE, SLEEPING, FINISHED, CALLER_SLEEPS, KERNEL, BLOCK, LIMIT, TEAM_BYTES = 0, 64, 128, 132, 192, 200, 208, 256
OPEN, HELPERS, NUMBER = 1 << 15, (1 << 15) - 1, 1 << 16  # of the gate
NUMBERS = 1 << 15  # kernels, then they count from 0 again
PATIENCE = 400_000  # cycles of the time stamp counter, 100 to 200 microseconds: longer than Python between two kernels
CALM = 64

USAGE_BYTES, THREAD, INVOLUNTARY = 144, 1, 136  # struct rusage, RUSAGE_THREAD, offset of ru_nivcsw


def _operation(result: Any, emit: Callable[..., Value | None], *arguments: Any) -> tuple[Any, Callable[..., Any]]:
    """Return an intrinsic's signature and code."""

    def code(context: Any, b: Builder, signature: Any, values: Sequence[Value]) -> Value:
        found = emit(b, *values)
        return context.get_dummy_value() if found is None else found

    return result(*arguments), code


@intrinsic
def read(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the int32 at an address, as other threads left it."""
    return _operation(types.int32, lambda b, place: b.load_atomic(at(b, place, 0, I32), "seq_cst", 4), types.int64)


@intrinsic
def write(context: object, address: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Store an int32 after everything that was stored before."""

    def emit(b: Builder, place: Value, value: Value) -> None:
        b.store_atomic(b.trunc(value, I32), at(b, place, 0, I32), "seq_cst", 4)

    return _operation(types.void, emit, types.int64, types.int64)


@intrinsic
def add(context: object, address: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Add to the int32 at an address atomically; return what it was."""

    def emit(b: Builder, place: Value, value: Value) -> Value:
        return b.atomic_rmw("add", at(b, place, 0, I32), b.trunc(value, I32), "seq_cst")

    return _operation(types.int32, emit, types.int64, types.int64)


@intrinsic
def replace(context: object, address: Any, found: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Replace the int32 `found` at an address by `value` atomically; return whether it was there."""

    def emit(b: Builder, place: Value, found: Value, value: Value) -> Value:
        pair = b.cmpxchg(at(b, place, 0, I32), b.trunc(found, I32), b.trunc(value, I32), "seq_cst", "seq_cst")
        return b.extract_value(pair, 1)

    return _operation(types.boolean, emit, types.int64, types.int64, types.int64)


@intrinsic
def sleep(context: object, address: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Sleep until `wake` is called for an address, unless its int32 is no longer `value`."""

    def emit(b: Builder, place: Value, value: Value) -> None:
        futex(b, place, WAIT, value)

    return _operation(types.void, emit, types.int64, types.int64)


@intrinsic
def wake(context: object, address: Any, count: Any) -> tuple[Any, Callable[..., Any]]:
    """Wake `count` threads that sleep at an address."""

    def emit(b: Builder, place: Value, count: Value) -> None:
        futex(b, place, WAKE, count)

    return _operation(types.void, emit, types.int64, types.int64)


@intrinsic
def cycles(context: object) -> tuple[Any, Callable[..., Any]]:
    """Return the time stamp counter."""

    def emit(b: Builder) -> Value:
        return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, []), "llvm.readcyclecounter"), [])

    return _operation(types.int64, emit)


@intrinsic
def pause(context: object) -> tuple[Any, Callable[..., Any]]:
    """Let some cycles pass."""
    return _operation(types.void, pause_core)


@intrinsic
def times_interrupted(context: object) -> tuple[Any, Callable[..., Any]]:
    """Return how often the system took the core from the calling thread for another one (getrusage)."""

    def emit(b: Builder) -> Value:
        usage = b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(I8, USAGE_BYTES)), I64)
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I32, I64]), "getrusage")
        b.call(function, [ir.Constant(I32, THREAD), usage])
        return b.load(at(b, usage, INVOLUNTARY, I64))

    return _operation(types.int64, emit)
