"""Show the report of `qmix doctor`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qmix.kernels.cpu.paths import PORTABLE
from qmix.machine.doctor import MachineReport
from qmix.machine.rates import RATE_LABELS, SLOW_FOUR_BIT, rate_text
from qmix.machine.wsl import MOVE, SLOW_DRIVE, Wsl
from qmix.units import format_bytes, plural

REINSTALL = "`pip install --force-reinstall --no-deps {}` may fix it"


def report_table(report: MachineReport) -> Table:
    """Return a table with a line for each part that decides what runs and how fast."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value, overflow="fold"))

    row("CPU", f"{report.cpu}, {plural(report.cores, 'core')}")
    row("4-bit kernel", _kernels(report))
    limit = "" if report.memory_limit is None else f"; a control group leaves {format_bytes(report.memory_limit)}"
    row("memory", f"{format_bytes(report.memory_available)} of {format_bytes(report.memory_total)} free{limit}")
    row("huge pages", report.huge_pages + _huge_pages(report))
    how = "read past the page cache" if report.direct_io else "no O_DIRECT here: reads go through the page cache"
    row("disk", f"{format_bytes(report.disk_free)} free at {report.directory}, {how}")
    for index, gpu in enumerate(report.gpus):
        fault = f"; does not work: {gpu.fault}" if gpu.fault else ", a matmul on it tested"
        fault += f"; slow without its kernels: {gpu.kernels}" if gpu.kernels else ""
        row(f"gpu:{index}", f"{gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free{fault}")
    if report.gpus:
        known = report.cuda_context
        row("CUDA context", "not measured" if known is None else f"{format_bytes(known)} of each GPU, measured")
    else:
        row("GPU", "a driver, but no GPU that this torch can use" if report.gpu_driver else "none")
    for name, text in wsl_rows(report.wsl, report.memory_total) if report.wsl is not None else ():
        row(name, text)
    row("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for name in RATE_LABELS:
        if report.gpus or not name.startswith(("gpu", "pcie")):
            row(RATE_LABELS[name], f"{rate_text(report.rates, name)}, {report.rates.source(name)}")
    return table


def wsl_rows(wsl: Wsl, memory_total: int) -> list[tuple[str, str]]:
    """Return the lines about WSL: its version, memory, drive and GPU, each with what to do where something is wrong."""
    if wsl.version == 1:
        return [("WSL", "version 1, which has no GPU and slow disks; `wsl --set-version DISTRIBUTION 2` in Windows")]
    default = "by default half of the PC's memory"
    memory = default if wsl.memory is None else f"{wsl.config} has memory={wsl.memory}"
    more = "for more, put `memory=NGB` under [wsl2] in .wslconfig in your Windows home, then `wsl --shutdown`"
    rows = [
        ("WSL", f"version 2, kernel {wsl.kernel}"),
        ("WSL memory", f"{format_bytes(memory_total)} for Linux: {memory}; {more}"),
    ]
    if wsl.drive is not None:
        rows.append(("WSL disk", f"stores would lie on {wsl.drive}, {SLOW_DRIVE}; {MOVE}"))
    if not wsl.device:
        gpu = "not passed through: there is no /dev/dxg; `wsl --update` in Windows, then `wsl --shutdown`"
    elif not wsl.library:
        gpu = (
            "passed through, but without CUDA: no libcuda.so in /usr/lib/wsl/lib; install NVIDIA's driver in Windows, "
            "none in Linux"
        )
    else:
        gpu = "passed through, with the CUDA library of the Windows driver"
    return [*rows, ("WSL GPU", gpu)]


def _kernels(report: MachineReport) -> str:
    """Return the result of the 4-bit trial, and what to do about it."""
    trial = report.four_bit
    if not trial.correct:
        return "tested: 4-bit matmul gives wrong values here; use precision int8, and please report it"
    rate = f"{format_bytes(trial.rate)}/s from cache, {trial.times:.0f} times as fast as without it"
    if trial.large is None:
        slower = f"4-bit matmul takes about {SLOW_FOUR_BIT:.0f} times as long"
        return f"none, tested: {slower}; {REINSTALL.format('numba llvmlite')}"
    if trial.small is None:
        return f"tested: none for small matrices; {REINSTALL.format('bitsandbytes')}. For large ones: {rate}"
    if trial.path == PORTABLE and report.best_path == PORTABLE:
        return f"a slow one, tested: this CPU has no AVX2, {rate}"
    better = f"; the CPU has {report.best_path}" if trial.path != report.best_path else ""
    return f"{'a slow one' if trial.path == PORTABLE else 'yes'}, tested: {trial.path}, {rate}{better}"


def _huge_pages(report: MachineReport) -> str:
    if report.on_huge_pages:
        return ", tested: memory is in huge pages"
    if report.on_huge_pages is None:
        return ", not tested: this kernel does not count them"
    if report.huge_pages in ("always", "madvise"):
        return ", tested: memory is not in huge pages; it may be fragmented, which a restart fixes"
    return "; `madvise` would make reads and matmuls faster"
