"""Compile for cards that are not there: the launches of a call are recorded, and their kernels compiled for a card."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps",)


class Launch:
    """A kernel with the arguments of one launch."""

    def __init__(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        self.values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        assert set(self.values) == set(kernel.arg_names)

    def compile(self, capability: int) -> Any:
        """Return Triton's result for a card of this compute capability, specialised as a launch specialises it."""
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        constants |= {name for name, value in self.values.items() if type(value) is int and value == 1}
        signature = {name: "constexpr" if name in constants else kind(value) for name, value in self.values.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, value) in enumerate(self.values.items())
            if name not in constants and (isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0))
        }
        source = ASTSource(self.kernel, signature, {name: self.values[name] for name in constants}, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def kind(value: Any) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def launches(monkeypatch: Any, call: Callable[[], object]) -> list[Launch]:
    """Return the launches of a call, which are not carried out."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(kernel, args, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        call()
    return found


def tool(name: str, made: Any, *options: str) -> str:
    """Return the output of one of the binary utilities that Triton brings, for a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        command = [str(TOOLS / name), *options, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(made: Any) -> tuple[int, int]:
    """Return a compiled kernel's registers and its bytes of stack, into which registers spill."""
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", made, "-res-usage"))[0]
    return int(registers), int(stack)
