"""The table of `qmix compare`."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from qmix.compare.fidelity import Fidelity
from qmix.units import format_bytes


def fidelity_table(rows: Sequence[Fidelity]) -> Table:
    """Return a table with a row for each variant, the reference first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("experts", overflow="fold")
    for name in ("bytes", "perplexity", "mean KL", "+/-", "99% below", "worst KL", "same top 1"):
        table.add_column(name, justify="right", overflow="fold")
    for index, row in enumerate(rows):
        divergences = (row.kl_mean, row.kl_error, row.kl_p99, row.kl_worst)
        shown = [f"{value:.3g}" for value in divergences] if index else [""] * len(divergences)
        agreement = f"{100 * row.top1:.2f}%" if index else ""
        table.add_row(row.name, format_bytes(row.expert_bytes), f"{row.perplexity:.4g}", *shown, agreement)
    return table
