"""Choose how many tokens a pass of many sequences takes: as many as are computed while its experts are read.

A pass with a chunk of prompts uses nearly every expert, and reads the experts without a slot, whatever its number of
tokens. While reading takes longer than computing, more prompt tokens in a pass cost no time: neither that of the pass,
nor of the sequences that are continued beside them. From there on every further token makes the pass longer for all of
them, and saves nothing. Both times are measured in each pass, because they depend on the cores, the disk, the share of
experts in memory and the pool's hits. While no sequence is being continued, the oldest prompt goes as a whole: nobody
waits for less.

Arithmetic only, loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.plan.memory import PREFILL_CHUNK


class Pace:
    """The tokens of a pass: at least a chunk, and `most`, for which the plan has memory."""

    def __init__(self, most: int = PREFILL_CHUNK) -> None:
        self.most = most
        self._balanced = PREFILL_CHUNK

    def tokens(self, left: Sequence[int]) -> int:
        """Return how many tokens the next pass may take, in whole chunks.

        `left` are the tokens that each sequence has still to take through the model, oldest first: one for a sequence
        that is being continued.
        """
        oldest = left[0] if left and min(left) > 1 else 0
        return min(self.most, max(self._balanced, -(-oldest // PREFILL_CHUNK) * PREFILL_CHUNK))

    def note(self, tokens: int, seconds: float, waited: float, reading: float) -> None:
        """Learn from a pass of `tokens` tokens: it took `seconds`, in which it `waited` for reads; the disk was
        `reading` for some of them.

        Passes of less than a chunk say nothing: their time does not grow with their tokens.
        """
        if tokens < PREFILL_CHUNK:
            return
        computing = max(seconds - waited, seconds / self.most)
        chunks = int(tokens * reading / computing) // PREFILL_CHUNK
        self._balanced = max(1, chunks) * PREFILL_CHUNK
