"""Format the runs of `full_size.py`: a row for each, with its ratio to the ceilings."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from qmix.units import format_bytes

Result = dict[str, Any]


def summary(run: Result, memory_read: float) -> Result:
    """Return the row of one run; the bound is the longest of what disk and memory must at least take.

    `memory_read` in bytes/s.
    """
    decode = statistics.median(run["decode_s"])
    row = {
        "engine": run["engine"],
        "batch": run.get("batch", 1),
        "prefill_tok_s": run["prompt_tokens"] * run.get("batch", 1) / run["prefill_s"],
        "decode_s": decode,
        "decode_mean_s": statistics.mean(run["decode_s"]),
        "decode_range_s": (min(run["decode_s"]), max(run["decode_s"])),
        "tok_s": run.get("batch", 1) / statistics.mean(run["decode_s"]),
        "limit": run["limit"],
        "group_peak": run["group_peak"],
    }
    if "slots" not in run:
        return row
    steps = len(run["decode_s"])
    memory = run["active_bytes"] / memory_read
    least = own = 0.0
    if "disk_read" in run:
        least, own = (run[name] / steps / run["disk_read"] for name in ("belady_bytes", "bytes_read"))
    names = ("hit_rate", "misses", "ahead", "hidden", "unused", "precision_ahead", "slots", "experts", "planned")
    return row | {
        "bytes_per_step": run["bytes_read"] / steps,
        "belady_bytes_per_step": run["belady_bytes"] / steps,
        "disk_gb_s": run["bytes_read"] / sum(run["decode_s"]) / 1e9,
        "memory_gb_s": run["active_bytes"] / decode / 1e9,
        "disk_ceiling_gb_s": run.get("disk_read", 0) / 1e9,
        "of_bound": max(least, memory) / row["decode_mean_s"],
        "of_own_reads": max(own, memory) / row["decode_mean_s"],
        "as_expected": run["all_as_expected"],
        "peak_memory": run["peak_memory"],
        "prefill_bytes": run["prefill_bytes"],
        "hidden_share": run["hidden"] / run["misses"] if run["misses"] else 0.0,
        "ahead_share": run["ahead"] / run["misses"] if run["misses"] else 0.0,
        **{name: run[name] for name in names},
    }


def show(stage: str, rows: list[Result]) -> None:
    table = Table(title=stage)
    columns = ("engine", "prefill tok/s", "s a step, median (range)", "tok/s", "hits", "GB a step", "GB/s", "of bound")
    for column in (*columns, "of own reads", "ahead / hidden / right", "peak"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["decode_range_s"]
        mine = [""] * 6
        if "slots" in row:
            rate = row["disk_gb_s"] if row["bytes_per_step"] else row["memory_gb_s"]
            mine = [f"{row['hit_rate']:.0%}", f"{row['bytes_per_step'] / 1e9:.2f}", f"{rate:.2f}"]
            mine += [f"{row['of_bound']:.0%}", f"{row['of_own_reads']:.0%}", _lookahead(row)]
        name = row["engine"] + (f" x {row['batch']}" if row["batch"] > 1 else "")
        times = f"{row['decode_s']:.3f} ({low:.3f}-{high:.3f})"
        cells = (f"{row['prefill_tok_s']:.1f}", times, f"{row['tok_s']:.2f}", *mine)
        table.add_row(name, *cells, format_bytes(row["group_peak"] or 0))
    Console(width=150).print(table)


def _lookahead(row: Result) -> str:
    """Shares of the reads that were begun ahead of need, and that were over by then; guesses for the next layer."""
    if row["precision_ahead"] is None:
        return ""
    return f"{row['ahead_share']:.0%} / {row['hidden_share']:.0%} / {row['precision_ahead'][0]:.0%}"
