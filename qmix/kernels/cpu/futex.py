"""Wait for another thread, in LLVM code: a pause between two looks at memory, and Linux's futex to sleep."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba.core import cgutils

from qmix.kernels.cpu.vectors import I32, I64, VOID, Builder, Value, call

FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine(), 0)  # the number of the system call
FUTEX = FUTEX if platform.system() == "Linux" else 0
WAIT, WAKE = 0, 1
_PRIVATE = 128


def futex(b: Builder, address: Value, operation: int, number: Value) -> None:
    """WAIT: sleep while the int32 at an address is `number`. WAKE: wake that many threads that sleep there.

    Without futexes, give the core to another thread instead.
    """
    if not FUTEX:
        call(b, "sched_yield", I32)
        return
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    number = b.zext(b.trunc(number, I32), I64)
    zero = ir.Constant(I64, 0)
    kind = ir.Constant(I64, operation | _PRIVATE)
    b.call(function, [ir.Constant(I64, FUTEX), address, kind, number, zero, zero, zero])


def pause_core(b: Builder) -> None:
    """Leave the core's execution units to its other hardware thread for some cycles."""
    if platform.machine() == "x86_64":
        call(b, "llvm.x86.sse2.pause", VOID)
