"""Instruction sets that the CPU kernels are built for, and the one in use.

The kernels are generated once for each path; LLVM then compiles them for the processor. Without a choice the best
path of this processor is taken. Another is chosen, for tests and reports, by Numba's own setting NUMBA_CPU_NAME, which
`environment` gives together with torch's, oneDNN's and MKL's, so that all of a process keeps to the same instructions.

avx512bf16   products of pairs of bf16 with fp32 sums (Cooper Lake, Sapphire Rapids, Zen 4)
avx512       AVX-512 F, BW, DQ and VL, sums in fp32 (Skylake-X, Ice Lake, 11th generation)
avx2         AVX2, FMA and F16C (Haswell to 14th generation and Core Ultra, Zen 1 to 3)
portable     plain LLVM code of any processor

Loads neither torch nor Numba.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qmix.errors import UsageError


@dataclass(frozen=True, slots=True)
class CpuPath:
    """A set of instructions.

    `lanes` fp32 numbers fill one of its `registers`; `needs` are Linux's names of its features, `llvm` is LLVM's of a
    processor which has these and no more; `limits` are environment variables that hold other libraries to it.
    """

    name: str
    lanes: int
    registers: int
    needs: tuple[str, ...]
    llvm: str
    limits: Mapping[str, str]

    @property
    def pairs(self) -> bool:
        """True if products of pairs of bf16 are one instruction (vdpbf16ps)."""
        return self.name == "avx512bf16"


PORTABLE = "portable"
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


def _limits(torch: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": torch, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


_ALL = (
    CpuPath("avx512bf16", 16, 32, (*_AVX512, "avx512_bf16"), "cooperlake", {}),
    CpuPath("avx512", 16, 32, _AVX512, "skylake-avx512", _limits("avx512", "AVX512_CORE", "AVX512")),
    CpuPath("avx2", 8, 16, ("avx2", "fma", "f16c"), "haswell", _limits("avx2", "AVX2", "AVX2")),
    CpuPath(PORTABLE, 4, 16, (), "generic", _limits("default", "SSE41", "SSE4_2")),
)
PATHS = {path.name: path for path in _ALL}


@cache
def current() -> CpuPath:
    """Return the path that kernels of this process are built for."""
    chosen = os.environ.get("NUMBA_CPU_NAME")  # read where Numba reads it
    return next((path for path in _ALL if path.llvm == chosen), supported()[0])


@cache
def supported() -> tuple[CpuPath, ...]:
    """Return the paths that this processor can run, best first."""
    flags = cpu_flags()
    return tuple(path for path in _ALL if flags.issuperset(path.needs))


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """Return the first core's instruction sets as Linux names them; none elsewhere and on other architectures."""
    try:
        with Path(cpuinfo).open(encoding="utf-8", errors="replace") as lines:
            found = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        found = ""
    return frozenset(found.partition(":")[2].split())


def environment(name: str) -> dict[str, str]:
    """Return the environment variables that hold a new process to the path `name`.

    They work if they are set before Numba and torch are loaded. Raises UsageError for an unknown path, and for one
    whose instructions this processor lacks.
    """
    if name not in PATHS:
        raise UsageError(f"{name!r} is not a CPU path; choose one of {', '.join(PATHS)}")
    path = PATHS[name]
    if path not in supported():
        known = ", ".join(path.name for path in supported())
        raise UsageError(f"this processor cannot run the CPU path {name}; choose one of {known}")
    return {"NUMBA_CPU_NAME": path.llvm, "NUMBA_CPU_FEATURES": "", **path.limits}
