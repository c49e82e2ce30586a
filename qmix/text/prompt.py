"""Tokenise a user's text in bounded memory: a text that cannot fit the context is refused before.

Tokenising takes hundreds of bytes of memory for each byte of text. A prompt is therefore checked in three steps. Its
bytes are compared with a context of the vocabulary's longest tokens. Then it is counted in pieces. Only a prompt that
fits is tokenised whole: that takes about a kilobyte a token, which is within a plan's reserve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmix.errors import UsageError, arg
from qmix.text.tokenizer import encode
from qmix.units import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 8192  # characters that are tokenised together, in at most 20 MB


class PromptTooLong(UsageError):
    """A user's text does not fit the context."""


def too_long(found: str, context: int, longest_context: int) -> PromptTooLong:
    """Return the error for a text of length `found`; it advises a larger context only where the model has one."""
    if context < longest_context:
        advice = f"shorten it, or give a larger {arg('context')}"
        return PromptTooLong(f"{found}, too long for a context of {context}; {advice}")
    return PromptTooLong(f"{found}, too long for a context of {context}, the model's longest; shorten it")


class PromptEncoder:
    """Tokenises prompts for `context` tokens; the model's own maximum is `longest_context`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, longest_context: int) -> None:
        self.tokenizer, self.context, self.longest_context = tokenizer, context, longest_context
        self._longest = longest_token(tokenizer)

    @property
    def most_bytes(self) -> int:
        """The bytes of the longest text that could fit, if every token were the vocabulary's longest."""
        return self.context * self._longest

    def ids(self, text: str, what: str = "the prompt") -> list[int]:
        """Return a text's token ids. Raises PromptTooLong where they leave no room for an answer."""
        self.check(text, what)
        ids = encode(self.tokenizer, text)
        self.check_count(len(ids), what)
        return ids

    def check(self, text: str, what: str = "the prompt") -> None:
        """Raise PromptTooLong where a text cannot fit. Texts of one piece, and texts that nearly fit, pass."""
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.most_bytes or self._exceeds(text):
            raise self.too_long(f"{what} is {size} bytes")

    def check_count(self, tokens: int, what: str = "the prompt") -> None:
        """Raise PromptTooLong where a prompt of `tokens` leaves no room for an answer."""
        if tokens >= self.context:
            raise self.too_long(f"{what} is {plural(tokens, 'token')}")

    def too_long(self, found: str) -> PromptTooLong:
        """Return the error for a text of length `found`."""
        return too_long(found, self.context, self.longest_context)

    def _exceeds(self, text: str) -> bool:
        """Count a text of several pieces, less what each cut may have added: at most a token's bytes."""
        if len(text) <= PIECE:
            return False
        counted = 0
        for start in range(0, len(text), PIECE):
            ids = encode(self.tokenizer, text[start : start + PIECE], add_special_tokens=False)
            counted += max(0, len(ids) - self._longest)
            if counted > self.context:
                return True
        return False


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the bytes of text of the vocabulary's longest token."""
    return max(len(token.replace("▁", " ").encode()) for token in tokenizer.get_vocab())


def encoded_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """Yield the token ids of a long text in pieces, cut before words: joined they are those of the whole text."""
    whole, first, second = (encode(tokenizer, part, add_special_tokens=False) for part in ("a b", "a", "b"))
    adds_space = whole == first + second  # the tokenizer puts one before a text, in place of the one at the cut
    start, special = 0, True
    while start < len(text):
        end = _before_word(text, start, start + PIECE)
        yield encode(tokenizer, text[start:end], add_special_tokens=special)
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
