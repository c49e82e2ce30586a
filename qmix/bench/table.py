"""Tables for a benchmark's report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from qmix.machine.rates import SLOW_FOUR_BIT
from qmix.terminal.tables import format_seconds
from qmix.units import format_bytes, plural

if TYPE_CHECKING:  # it imports torch
    from qmix.bench.report import BenchReport, Row
    from qmix.machine.probes import Rate


def bench_table(report: BenchReport) -> Table:
    """Return a row for each workload; readable from 60 columns on."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("test", no_wrap=True)
    for name in ("tok/s", "TTFT", "TPOT", "hit\nrate", "read a\ntoken", "of\nbound"):
        table.add_column(name, justify="right", overflow="fold")
    for row in report.rows:
        decimals = _decimals(row.rate)
        cells = (
            f"{row.rate:.{decimals}f} ± {row.rate_sd:.{decimals}f}",
            format_seconds(row.ttft_s),
            "" if row.tpot_s is None else format_seconds(row.tpot_s),
            f"{100 * row.hit_rate:.1f}%",
            format_bytes(row.bytes_per_token),
            f"{100 * row.share_of_bound:.3g}%",
        )
        table.add_row(row.workload.name, *cells)
    return table


def bench_conditions(report: BenchReport) -> Table:
    """Return the conditions of the rows."""
    plan, ceilings = report.plan, report.ceilings
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("model", f"{report.model}, experts {report.precision}, the rest {report.dtype}")
    row("memory", f"{format_bytes(plan.ram)} budget, peak {format_bytes(report.peak_memory)}")
    resident = plan.num_records - plan.host_records if plan.devices else 0
    on_gpus = f"{resident} of {plan.num_records} on GPUs, " if plan.devices else ""
    row("experts", f"{on_gpus}{plan.slots} of {plan.num_records} fit in memory; context {plan.context}")
    row("machine", f"{report.cpu}, {plural(report.threads, 'thread')}")
    if not report.fast_kernels:
        row("", f"no fast 4-bit kernel for this model here: 4-bit matmuls are {SLOW_FOUR_BIT:.0f} times slower")
    row("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    row("memory read", _rate(ceilings.memory_read))
    if ceilings.disk_read is not None:
        row("disk read", _rate(ceilings.disk_read))
    row("matmul", _rate(ceilings.matmul, "FLOP"))
    for index, gpu in enumerate(ceilings.gpus):
        row(f"gpu:{index} memory", _rate(gpu["gpu_memory"]))
        row(f"gpu:{index} matmul", _rate(gpu["gpu_matmul"], "FLOP"))
        row(f"to gpu:{index}", _rate(gpu["pcie"]))
    for measured in report.rows:
        row("bound", _bound(measured))
    return table


def _rate(rate: Rate, unit: str = "B") -> str:
    median, *spread = (f"{format_bytes(value)[:-1]}{unit}/s" for value in (rate.median, *rate.spread))
    return f"{median} ({' to '.join(spread)}): {rate.how}"


def _bound(row: Row) -> str:
    after = f" after a prompt of {row.workload.prompt_tokens}" if row.workload.decode_steps else ""
    read = f"; reads {format_bytes(row.least_bytes_per_token)} a token" if row.least_bytes_per_token else ""
    return (
        f"{row.workload.name}{after}: {row.bound_rate:.{_decimals(row.bound_rate)}f} tok/s, set by {row.bound_by}{read}"
    )


def _decimals(value: float) -> int:
    """Return the decimals that show four digits of a number above zero."""
    return max(0, 3 - math.floor(math.log10(value)))
