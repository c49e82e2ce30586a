"""The line of statistics after an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmix.units import format_bytes, plural

if TYPE_CHECKING:  # it imports torch
    from qmix.engine.stream import Result


def statistics(result: Result) -> str:
    """Return the line that follows an answer."""
    new, cached = ("new ", f" ({result.reused_tokens} cached)") if result.reused_tokens else ("", "")
    return (
        f"{plural(result.prefilled_tokens, f'{new}prompt token')}{cached} "
        f"in {result.ttft_s:.2f} s ({result.prompt_rate:.1f} tok/s), "
        f"{plural(result.completion_tokens, 'new token')} at {result.rate:.2f} tok/s, "
        f"{100 * result.hit_rate:.1f}% of experts in memory, "
        f"{format_bytes(result.bytes_read)} read, peak {format_bytes(result.peak_memory)} "
        f"of {format_bytes(result.budget)}, seed {result.seed}"
    )
