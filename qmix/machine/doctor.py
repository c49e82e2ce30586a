"""Examine this machine: processor, kernels, memory and its limits, disk, GPUs, versions.

A capability is tried rather than read from a flag or a setting: a 4-bit product, memory on huge pages, a direct read, a
product on each GPU. Measures no speeds.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from msgspec import to_builtins

from qmix.disk import PAGE
from qmix.disk.space import existing_parent
from qmix.files import scratch_file
from qmix.kernels.cpu.paths import supported
from qmix.kernels.gpu.shapes import available, fits_card
from qmix.machine.cuda_context import context_bytes
from qmix.machine.dense_experts import try_dense
from qmix.machine.found import available_memory, cpu_name, free_disk, gpu_driver
from qmix.machine.measured import FourBitTrial, MeasuredGpus, versions
from qmix.machine.rates import RATE_NAMES, Rates
from qmix.machine.wsl import Wsl, find_wsl
from qmix.version import __version__

STACK = ("torch", "bitsandbytes", "transformers", "accelerate", "numba")
PRODUCT = 128  # rows and columns of the matrix multiplied on a GPU
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_TRIAL = 32 * 2**20  # bytes allocated to see whether they are on huge pages


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it; sizes in bytes.

    `fault` is why a product on it failed, empty if it did not; `kernels` why qmix's own cannot be launched.
    """

    name: str
    total: int
    free: int
    fault: str = ""
    kernels: str = ""


@dataclass(frozen=True, slots=True)
class MachineReport:
    """A machine's hardware, software and rates; sizes in bytes.

    `memory_limit` is what control groups leave of the memory, if less than `memory_available`. `four_bit` is the trial
    of a 4-bit product, `best_path` the best instructions by the CPU's flags. `huge_pages` is the kernel's setting
    ("always", "madvise", "never", or "unknown"), `on_huge_pages` is true if memory was on huge pages when some was
    allocated (None: the kernel does not tell). `cuda_context` are the bytes of CUDA's context on a GPU, if measured.
    `direct_io` is true if `directory` is on a filesystem that reads past the page cache. `wsl` is what the Windows
    Subsystem for Linux decides, None elsewhere.
    """

    cpu: str
    cores: int
    best_path: str
    four_bit: FourBitTrial
    memory_total: int
    memory_available: int
    memory_limit: int | None
    huge_pages: str
    on_huge_pages: bool | None
    directory: Path
    disk_free: int
    direct_io: bool
    gpus: tuple[Gpu, ...]
    gpu_driver: bool
    cuda_context: int | None
    versions: dict[str, str]
    rates: Rates
    wsl: Wsl | None = None

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["gpus"] = [asdict(gpu) for gpu in self.gpus]
        fields["wsl"] = None if self.wsl is None else asdict(self.wsl)
        fields["four_bit"] = to_builtins(self.four_bit)
        fields["fast_kernels"] = self.four_bit.fast
        return {"schema": "qmix-doctor-1", **fields, "directory": str(self.directory), "rates": self.rates.to_json()}

    @property
    def typical(self) -> list[str]:
        """Rates that were not measured here."""
        wanted = (name for name in RATE_NAMES if self.gpus or not name.startswith(("gpu", "pcie")))
        return [name for name in wanted if self.rates.source(name) == "typical"]


def examine(directory: Path, rates: Rates, four_bit: FourBitTrial, cuda_context: int | None = None) -> MachineReport:
    """Return a report on this machine, the disk of `directory`, the trial of a 4-bit product and CUDA's context."""
    memory, available = psutil.virtual_memory(), available_memory()
    return MachineReport(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        best_path=supported()[0].name,
        four_bit=four_bit,
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=available if available < memory.available else None,
        huge_pages=huge_pages(),
        on_huge_pages=takes_huge_pages(),
        directory=directory,
        disk_free=free_disk(directory),
        direct_io=reads_directly(directory),
        gpus=_gpus(),
        gpu_driver=gpu_driver(),
        cuda_context=cuda_context,
        versions={"qmix": __version__, "python": platform.python_version()} | versions(STACK),
        rates=rates,
        wsl=find_wsl(directory),
    )


def huge_pages(path: Path = HUGE_PAGES) -> str:
    """Return the kernel's setting of huge pages, the word in brackets."""
    try:
        chosen = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        return "unknown"
    return chosen[1] if chosen else "unknown"


def takes_huge_pages(counts: Path = Path("/proc/self/smaps_rollup")) -> bool | None:
    """Return True if memory allocated like the pool's is on huge pages; None where the kernel does not tell."""
    from qmix.precision.memory import anonymous_memory

    before = _huge_bytes(counts)
    memory = anonymous_memory(HUGE_TRIAL)
    after = _huge_bytes(counts)
    del memory
    return None if before is None or after is None else after - before >= HUGE_TRIAL // 2


def _huge_bytes(counts: Path) -> int | None:
    try:
        found = re.search(r"^AnonHugePages:\s+(\d+) kB", counts.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reads_directly(directory: Path) -> bool:
    """Return True if files in a directory are read with O_DIRECT, tried on one that is deleted at once."""
    try:
        with scratch_file(existing_parent(directory) / ".qmix-doctor") as (path, file):
            file.write(bytes(PAGE))
            file.flush()
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            try:
                return os.preadv(fd, [mmap.mmap(-1, PAGE)], 0) == PAGE
            finally:
                os.close(fd)
    except OSError:
        return False


def _gpus() -> tuple[Gpu, ...]:
    if not gpu_driver():
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        fault = product_fault(f"cuda:{index}")
        kernels = "" if fault else kernels_fault(torch.cuda.get_device_capability(index))
        found.append(Gpu(torch.cuda.get_device_name(index), total, free, fault, kernels))
    return tuple(found)


def kernels_fault(capability: tuple[int, int]) -> str:
    """Return in a line why a card of this compute capability has not all of qmix's kernels; empty if it has."""
    if not available():
        return "Triton is not installed"
    from qmix.kernels.gpu.launching import launch_fault

    if fault := launch_fault():
        return fault
    if not fits_card("fp16", capability):
        return f"they need a card of compute capability 7.5 or later, this one has {'.'.join(map(str, capability))}"
    return "" if fits_card("bf16", capability) else "it has none for bf16; quantise the model in fp16"


def examine_gpus() -> MeasuredGpus:
    """Return the names of the GPUs that work here, and what was measured of the kernels on them.

    CUDA's context is the most that it takes of one of them.
    """
    gpus = [(index, gpu.name) for index, gpu in enumerate(_gpus()) if not gpu.fault]
    contexts = [context_bytes(index) for index, _ in gpus]
    known = [context for context in contexts if context]
    names = tuple(name for _, name in gpus)
    return MeasuredGpus(names, max(known, default=None), try_dense([index for index, _ in gpus]))


def product_fault(device: str) -> str:
    """Return in a line why a half-precision product on a device fails; empty if it gives the right values.

    torch also lists GPUs that it has no kernels for.
    """
    import torch

    try:
        ones = torch.ones(PRODUCT, PRODUCT, dtype=torch.bfloat16, device=device)
        return "" if bool((ones @ ones == PRODUCT).all()) else "a product on it gives wrong values"
    except RuntimeError as error:  # torch's own errors, for example a missing kernel
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
