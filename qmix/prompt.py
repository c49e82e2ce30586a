"""A user's text to token ids, in bounded memory: refused before it is tokenised where it cannot fit a context.

Tokenising takes hundreds of bytes of memory for each byte of text. So a prompt is first bounded by the bytes that a
context of the vocabulary's longest tokens could hold, then counted in pieces, and tokenised whole only where it fits:
that takes about a kilobyte a token, which is within a plan's reserve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmix.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 8192  # characters that are tokenised together: they take at most 20 MB


class PromptTooLong(UsageError):
    """A user's text does not fit the context."""


class PromptEncoder:
    """Tokenises prompts for a context of `context` tokens; the model's own maximum is `longest_context`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, longest_context: int) -> None:
        self.tokenizer, self.context, self._longest_context = tokenizer, context, longest_context
        self._longest = longest_token(tokenizer)

    def ids(self, text: str, what: str = "the prompt") -> list[int]:
        """Return a text's token ids. Raises PromptTooLong where they leave no room for an answer."""
        self.check(text, what)
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        self.check_count(len(ids), what)
        return ids

    def check(self, text: str, what: str = "the prompt") -> None:
        """Raise PromptTooLong where a text cannot fit; a text of one piece, and one that nearly fits, pass."""
        size = len(text.encode())
        if size > self.context * self._longest or self._exceeds(text):
            raise self.too_long(f"{what} is {size} bytes")

    def check_count(self, tokens: int, what: str = "the prompt") -> None:
        """Raise PromptTooLong where so many tokens leave no room for an answer."""
        if tokens >= self.context:
            raise self.too_long(f"{what} is {tokens} tokens")

    def too_long(self, found: str) -> PromptTooLong:
        """Return the error of a text with what helps: a larger context only where the model has one."""
        if self.context < self._longest_context:
            remedy = f"too long for a context of {self.context}; shorten it, or give a larger --context"
        else:
            remedy = f"too long for a context of {self.context}, the model's longest; shorten it"
        return PromptTooLong(f"{found}, {remedy}")

    def _exceeds(self, text: str) -> bool:
        """Count a text of several pieces, leaving out what its cuts may have added: no more than a token's bytes."""
        if len(text) <= PIECE:
            return False
        counted = 0
        for start in range(0, len(text), PIECE):
            ids = self.tokenizer(text[start : start + PIECE], add_special_tokens=False, verbose=False)["input_ids"]
            counted += max(0, len(ids) - self._longest)
            if counted > self.context:
                return True
        return False


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most bytes of text that a token of the vocabulary stands for."""
    return max(len(token.replace("▁", " ").encode()) for token in tokenizer.get_vocab())


def encoded_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """Yield the token ids of a long text in pieces, cut before words so that they join to those of the whole text."""
    whole, first, second = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in ("a b", "a", "b")
    )
    adds_space = whole == first + second  # the tokenizer puts one before a text, in place of the one at the cut
    start, special = 0, True
    while start < len(text):
        end = _before_word(text, start, start + PIECE)
        yield tokenizer(text[start:end], add_special_tokens=special, verbose=False)["input_ids"]
        start, special = end + (adds_space and text[end : end + 1] == " "), False


def _before_word(text: str, start: int, end: int) -> int:
    """Return the last place up to `end` where a single space is followed by a word; `end` where there is none."""
    if end >= len(text):
        return len(text)
    at = end
    while (at := text.rfind(" ", start + 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return end
