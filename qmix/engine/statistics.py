"""The line of statistics behind an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmix.units import format_bytes

if TYPE_CHECKING:  # it imports torch
    from qmix.engine.stream import Result


def statistics(result: Result) -> str:
    """The one line behind an answer."""
    reused = f" after {result.reused_tokens} kept" if result.reused_tokens else ""
    return (
        f"{result.prefilled_tokens} prompt tokens{reused} in {result.ttft_s:.2f} s ({result.prompt_rate:.1f} tok/s), "
        f"{result.completion_tokens} new at {result.rate:.2f} tok/s, "
        f"{100 * result.hit_rate:.1f}% of experts in memory, "
        f"{format_bytes(result.bytes_read)} read, peak {format_bytes(result.peak_memory)} "
        f"of {format_bytes(result.budget)}, seed {result.seed}"
    )
