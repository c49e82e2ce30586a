"""Token ids to text as they come: whole characters only, and nothing that may be the start of a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qmix.errors import UsageError

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no whole character yet
CONTEXT_TOKENS = 8  # of the prompt, so that a leading space is decoded as one


def check_text(text: str, what: str = "the text") -> None:
    """Raise UsageError where a text holds half of a surrogate pair, which bytes that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what}: not UTF-8 text (character {error.start + 1})") from None


class Detokenizer:
    """Decodes one token after another; `decode` is a tokenizer's, ids to text.

    Only the tokens since the last whole piece of text are decoded again, so the cost of a token does not grow.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._from, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is left, even if it is no whole character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


class StopScanner:
    """Passes text on until a stop sequence appears, which is left out, as is all that follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop sequence."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text may begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
