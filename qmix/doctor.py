"""What this machine is: processor, kernels, memory and its limits, disk, GPUs, versions. Measures nothing."""

from __future__ import annotations

import mmap
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from qmix import __version__
from qmix.disk import existing_parent
from qmix.machine import available_memory, cpu_name, free_disk, gpu_driver, has_fast_kernels
from qmix.plan.hardware import RATE_NAMES, Rates

STACK = ("torch", "bitsandbytes", "transformers", "accelerate", "numba")
PAGE = 4096
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Report:
    """`memory_limit` is what control groups leave of the memory, where that is less; sizes in bytes.

    `huge_pages` is the kernel's setting ("always", "madvise", "never", or "unknown"), `direct_io` whether `directory`
    is on a filesystem that reads past the page cache.
    """

    cpu: str
    cores: int
    fast_kernels: bool
    memory_total: int
    memory_available: int
    memory_limit: int | None
    huge_pages: str
    directory: Path
    disk_free: int
    direct_io: bool
    gpus: tuple[Gpu, ...]
    gpu_driver: bool
    versions: dict[str, str]
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["gpus"] = [asdict(gpu) for gpu in self.gpus]
        return {"schema": "qmix-doctor-1", **fields, "directory": str(self.directory), "rates": self.rates.to_json()}

    @property
    def typical(self) -> list[str]:
        """Rates that nobody measured here."""
        wanted = (name for name in RATE_NAMES if self.gpus or not name.startswith(("gpu", "pcie")))
        return [name for name in wanted if self.rates.source(name) == "typical"]


def examine(directory: Path, rates: Rates) -> Report:
    """This machine, with the disk that `directory` lies on."""
    memory, available = psutil.virtual_memory(), available_memory()
    return Report(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        fast_kernels=has_fast_kernels(),
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=available if available < memory.available else None,
        huge_pages=huge_pages(),
        directory=directory,
        disk_free=free_disk(directory),
        direct_io=reads_directly(directory),
        gpus=_gpus(),
        gpu_driver=gpu_driver(),
        versions={"qmix": __version__, "python": platform.python_version()} | _versions(),
        rates=rates,
    )


def huge_pages(path: Path = HUGE_PAGES) -> str:
    """The kernel's setting, the word in brackets."""
    try:
        chosen = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        return "unknown"
    return chosen[1] if chosen else "unknown"


def reads_directly(directory: Path) -> bool:
    """Whether files there are read with O_DIRECT, tried on one that is deleted at once."""
    path = existing_parent(directory) / f".qmix-doctor-{os.getpid()}"
    try:
        path.write_bytes(bytes(PAGE))
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            return os.preadv(fd, [mmap.mmap(-1, PAGE)], 0) == PAGE
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def _gpus() -> tuple[Gpu, ...]:
    if not gpu_driver():
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return tuple(found)


def _versions() -> dict[str, str]:
    found = {}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
