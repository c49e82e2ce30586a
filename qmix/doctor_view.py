"""What `qmix doctor` shows."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qmix.doctor import Report
from qmix.plan.hardware import RATE_NAMES, SLOW_FOUR_BIT
from qmix.plan.view import rate_text
from qmix.units import format_bytes

MEANINGS = {
    "memory_read": "reading memory",
    "disk_read": "reading the disk",
    "pcie": "memory to GPU",
    "matmul": "bf16 products",
    "four_bit_read": "4-bit products",
    "gpu_memory": "reading GPU memory",
    "gpu_matmul": "products on a GPU",
    "layer_seconds": "a layer's own time",
    "read_seconds": "a read's own time",
}


def report_table(report: Report) -> Table:
    """A line for each thing that decides what runs and how fast."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value, overflow="fold"))

    row("CPU", f"{report.cpu}, {report.cores} {'core' if report.cores == 1 else 'cores'}")
    row("4-bit kernel", _kernels(report))
    limit = "" if report.memory_limit is None else f"; a control group leaves {format_bytes(report.memory_limit)}"
    row("memory", f"{format_bytes(report.memory_available)} of {format_bytes(report.memory_total)} free{limit}")
    advice = (
        "" if report.huge_pages in ("always", "madvise") else "; with `madvise` records are read and multiplied faster"
    )
    row("huge pages", report.huge_pages + advice)
    how = "read past the page cache" if report.direct_io else "no O_DIRECT here: reads go through the page cache"
    row("disk", f"{format_bytes(report.disk_free)} free at {report.directory}, {how}")
    for index, gpu in enumerate(report.gpus):
        row(f"gpu:{index}", f"{gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free")
    if not report.gpus:
        row("GPU", "a driver, but no GPU that this torch can use" if report.gpu_driver else "none")
    row("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for name in RATE_NAMES:
        if report.gpus or not name.startswith(("gpu", "pcie")):
            row(MEANINGS[name], f"{rate_text(report.rates, name)}, {report.rates.source(name)}")
    return table


def _kernels(report: Report) -> str:
    if report.fast_kernels:
        return "yes: AVX512-BF16"
    return f"no fast 4-bit kernel on this CPU (it has no AVX512-BF16): {SLOW_FOUR_BIT:.0f} times slower"
