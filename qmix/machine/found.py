"""Find this computer's memory, its limits, and what Python itself takes of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import psutil

from qmix.disk.places import cache_directory
from qmix.disk.space import existing_parent
from qmix.errors import QmixError
from qmix.files import read_state, write_whole
from qmix.kernels.cpu.paths import current
from qmix.kernels.sources import source_digest
from qmix.version import __version__

_LOG = logging.getLogger(__name__)
SHARE_OF_AVAILABLE = 0.9  # of the available memory, where no budget is given; the rest is for other processes
SECONDS, KERNELS_SECONDS = 3, 20  # of measuring Python's memory: typical, for the line that announces it
INSTALLED = (".dist-info", ".egg-info", ".egg-link", ".pth")
AT_START = ("sitecustomize", "usercustomize")


def own_memory() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Return the most resident bytes that this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise QmixError("/proc/self/status: has no VmHWM line; qmix measures memory on Linux only")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: the system's, or less where a cgroup limits it."""
    free = psutil.virtual_memory().available
    limits = [_room(directory) for directory in _cgroups(root)]
    return min([free, *(room for room in limits if room is not None)])


def default_budget() -> int:
    """Return the budget where none is given: 90% of the available memory, and what this process already holds."""
    return own_memory() + int(available_memory() * SHARE_OF_AVAILABLE)


def cpu_name(root: Path = Path("/")) -> str:
    """Return the CPU's name from the kernel."""
    return _cpuinfo(root).get("model name") or platform.processor() or platform.machine()


def torch_threads() -> int:
    """Return how many threads torch computes with: OMP_NUM_THREADS, read where torch reads it, or the cores."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isascii() and stated.isdigit() and int(stated) else psutil.cpu_count(False) or 1


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the fields of the first core."""
    try:
        first = (root / "proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def free_disk(path: Path) -> int:
    """Return the free bytes on the disk of a path that need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def gpu_driver(root: Path = Path("/")) -> bool:
    """Return True if there is any sign of a GPU that torch could use; without one torch need not be imported."""
    return any((root / place).exists() for place in ("dev/nvidiactl", "proc/driver/nvidia", "dev/kfd", "dev/dxg"))


def found_gpus() -> tuple[int, ...]:
    """Return the free bytes of each GPU that torch can use. Imports torch only where there is a driver."""
    if not gpu_driver():
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))


def gpu_names() -> tuple[tuple[str, int], ...]:
    """Return the name and the bytes of each GPU of `found_gpus`."""
    if not found_gpus():
        return ()
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple((gpu.name, gpu.total_memory) for gpu in found)


def _cgroups(root: Path) -> list[Path]:
    """Return the memory cgroups of this process, the innermost first, version 1 or 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if controllers == "memory":
            base /= "memory"
        elif controllers:
            continue
        inner = base / path.lstrip("/")
        found += [directory for directory in (inner, *inner.parents) if directory.is_relative_to(base)]
    return found


def _room(group: Path) -> int | None:
    """Return the bytes that a cgroup still allows: its limit less what cannot be reclaimed; None without a limit."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (group / limit_name).read_text().strip()
            if limit == "max" or int(limit) >= 2**60:
                return None
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            return max(0, int(limit) - int((group / usage_name).read_text()) + cached)
        except (OSError, ValueError):
            continue
    return None


class InterpreterMemory(msgspec.Struct, frozen=True):
    """The measurement in the cache directory."""

    bytes: Annotated[int, msgspec.Meta(ge=2**20, le=2**40)]


def interpreter_memory(cache: Path | None = None, kernels: bool = False) -> int:
    """Return the resident bytes of Python with all that a run imports and warms up, before any weights.

    With `kernels` they include the compiled products and attention of large models. Measured in a process of its own,
    which imports transformers as this one does, and kept in the cache directory until anything installed changes.
    """
    path = interpreter_path(cache, kernels)
    known = read_state(path, InterpreterMemory)
    if known is not None:
        return known.bytes
    options = [*(["kernels"] if kernels else []), *(["whole"] if transformers_is_whole() else [])]
    command = ["-m", "qmix.engine.baseline", *options]
    if kernels:
        _LOG.info("measuring the memory of Python, and compiling missing kernels: once, up to %d s", KERNELS_SECONDS)
    else:
        _LOG.info("measuring the memory of Python: once, about %d s", SECONDS)
    if kernels:  # in processes of their own: compiling takes more memory than the kernels
        _python("-m", "qmix.engine.compile_kernels")
    measured = InterpreterMemory(int(_python(*command).split()[-1]))
    with suppress(OSError):  # a cache that cannot be written only costs the next run a few seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(measured))
    return measured.bytes


def known_interpreter_memory(kernels: bool = False) -> int | None:
    """Return what `interpreter_memory` has measured before, None where it would measure now."""
    known = read_state(interpreter_path(None, kernels), InterpreterMemory)
    return None if known is None else known.bytes


def _python(*arguments: str) -> str:
    """Return what another Python prints. Raises QmixError where it fails."""
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = run.stderr.strip().splitlines()[-1:] or ["no message"]
        raise QmixError(f"measuring Python's own memory failed: {last[0]}")
    return run.stdout


def interpreter_path(cache: Path | None = None, kernels: bool = False) -> Path:
    """Return the path of the measurement; its name follows from all that it depends on."""
    cores = len(os.sched_getaffinity(0))  # each has a thread
    paths = [path for path in sys.path if path and Path(path) != Path.cwd()]  # where a command starts changes nothing
    compiled = [cpu_name(), source_digest()] if kernels else []  # a processor and a state of the sources
    conditions = [cores, current().name, compiled, transformers_is_whole()]
    identity = [__version__, sys.version, sys.executable, *conditions, installed(paths)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return (cache or cache_directory()) / f"interpreter-{key}.json"


def transformers_is_whole() -> bool:
    """Return whether this process has transformers with the parts of torch that `qmix.model.lean` leaves out."""
    return "torch.distributed.tensor" in sys.modules


def forget_interpreter_memory(cache: Path | None = None) -> None:
    """Make the next call of `interpreter_memory` measure again."""
    for kernels in (False, True):
        with suppress(OSError):
            interpreter_path(cache, kernels).unlink()


def installed(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Return the names and dates of the distributions on these import paths, and of what Python runs at its start.

    Libraries import others where they find them, so any distribution may change what a run takes. A name contains the
    version, and the date changes when the same version is installed again. It takes a millisecond for 130
    distributions, importlib.metadata 300.
    """
    found = set()
    for path in paths:
        with suppress(OSError), os.scandir(path or ".") as entries:
            for entry in entries:
                if entry.name.endswith(INSTALLED) or entry.name.startswith(AT_START):
                    found.add((entry.name, entry.stat().st_mtime_ns))
    return sorted(found)
