"""The progress display and the summary line of a batch."""

from __future__ import annotations

from qmix.batch.answering import Summary
from qmix.terminal.progress import JobDisplay, time_left
from qmix.units import format_bytes, plural


class BatchDisplay(JobDisplay):
    """A progress display, called with a summary after each pass."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._total = 0

    def __call__(self, summary: Summary) -> None:
        told = self.told(summary)
        count, rate, left = f"{summary.done}/{summary.lines} lines", told[2], told[3]
        self.show(summary.done, summary.lines, told, count=count, rate=rate, left=left)

    def told(self, summary: Summary) -> list[str]:
        """Return the parts of a line: the lines that are done, their share, the speed, and the time left or ""."""
        self._total = max(self._total, summary.tokens_left)  # tokens left at the start
        return [
            f"{summary.done} of {plural(summary.lines, 'line')}",
            f"{100 * summary.done // summary.lines}%",
            f"{summary.rate:.1f} tok/s",
            self._time_left(summary),
        ]

    def _time_left(self, summary: Summary) -> str:
        """Return the time left, from the tokens that finished lines could have needed; "" until there is one."""
        finished = self._total - summary.tokens_left
        if not finished or not summary.tokens_left:
            return ""
        return time_left(summary.seconds * summary.tokens_left / finished)


def summary_line(summary: Summary, seed: int) -> str:
    """Return the line that follows a batch."""
    parts = [f"{summary.done} of {plural(summary.lines, 'line')}"]
    if summary.refused:
        parts.append(plural(summary.refused, "error"))
    if summary.resumed:
        parts.append(f"{summary.resumed} from earlier runs")
    if summary.passes:
        parts += [
            f"{plural(summary.new_tokens, 'new token')} in {summary.seconds:.2f} s ({summary.rate:.2f} tok/s)",
            plural(summary.prompt_tokens, "prompt token"),
            f"batch {summary.batch}",
            f"{100 * summary.hit_rate:.1f}% of experts in memory",
            f"{format_bytes(summary.bytes_read)} read",
            f"peak {format_bytes(summary.peak_memory)} of {format_bytes(summary.budget)}",
        ]
    return ", ".join([*parts, f"seed {seed}"])
