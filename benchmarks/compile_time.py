"""Time the compilation of the CPU kernels, as on the first use of an installation.

    python benchmarks/compile_time.py

Every part is compiled into an empty cache: each in a process of its own, whose CPU time counts without the imports, and
then all of them by `qmix.engine.compile_kernels`, in wall time on this process's cores. With many cores that takes
about the longest part and the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table

from qmix.engine.compile_kernels import PARTS

PART = """
import sys, time
import torch
from qmix.engine.compile_kernels import PARTS
started = time.process_time()
PARTS[int(sys.argv[1])]()
print(started, time.process_time() - started)
"""


def python(*arguments: str) -> str:
    """Return what Python prints, with an empty cache of kernels."""
    with tempfile.TemporaryDirectory() as cache:
        held = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=held, stdout=subprocess.PIPE, text=True, check=True).stdout


def name_of(part: Callable[[], None]) -> str:
    """Return a part's name, with the precision that it is for."""
    if isinstance(part, partial):
        return " ".join((part.func.__name__, *part.args)).strip("_")
    return part.__name__.strip("_")


def main() -> None:
    """Print a table and a JSON line."""
    table = Table(title="kernels compiled into an empty cache")
    table.add_column("part")
    table.add_column("CPU seconds", justify="right")
    names = [name_of(part) for part in PARTS]
    seconds, imports = [], 0.0
    for number, name in enumerate(names):
        imports, part = map(float, python("-c", PART, str(number)).split())
        seconds.append(part)
        table.add_row(name, f"{part:.1f}")
    started = time.perf_counter()
    python("-m", "qmix.engine.compile_kernels")
    wall, cores = time.perf_counter() - started, len(os.sched_getaffinity(0))
    table.add_section()
    table.add_row("all", f"{sum(seconds):.1f}")
    table.add_row("imports of a process", f"{imports:.1f}")
    table.add_row(f"all in wall time, {cores} cores", f"{wall:.1f}")
    table.add_row("longest part and imports", f"{max(seconds) + imports:.1f}")
    Console().print(table)
    parts = dict(zip(names, seconds, strict=True))
    print(json.dumps({"parts": parts, "imports": imports, "wall": wall, "cores": cores}))


if __name__ == "__main__":
    main()
