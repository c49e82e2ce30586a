"""Decode token ids as they come: whole characters only, and nothing that may begin a stop sequence.

A token may be part of a character. Its bytes are in the vocabulary, but decoders do not return them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from qmix.errors import UsageError

REPLACEMENT = "\ufffd"  # a decoder's output for an incomplete character
CONTEXT_TOKENS = 8  # of the prompt, so that a leading space is kept


def check_text(text: str, what: str = "the text") -> None:
    """Raise UsageError where a text holds half of a surrogate pair: Python reads bytes that are not UTF-8 as such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what}: not UTF-8 text (character {error.start + 1})") from None


class Detokenizer:
    """Decodes one token after another; `decode` turns ids into text.

    Only the tokens since the last whole piece of text are decoded again, so the cost of a token does not grow.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._from, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty in the middle of a character."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """Return the rest, even if it is an incomplete character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


class TokenBytes:
    """Maps a token to the bytes that it adds to a text, or None for a special token, which adds none.

    Two kinds of vocabulary are supported. In sentencepiece's, which Mixtral has, "\u2581" is a space and `<0xE2>` one
    byte. In byte-level BPE every character of a token stands for a byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = _decoder_steps(json.loads(backend.to_str())["decoder"]) if backend is not None else None
        kinds = None if steps is None else {step["type"] for step in steps}
        self._byte_level = kinds is not None and "ByteLevel" in kinds
        self._byte_tokens = kinds is None or "ByteFallback" in kinds
        self._replaced = SENTENCEPIECE if steps is None else _replacements(steps)

    def __call__(self, token: int) -> bytes | None:
        if token in self._special:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model's head may have more rows than the vocabulary has tokens
            return b""
        if self._byte_level:
            found = [BYTE_LEVEL.get(character) for character in piece]
            return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._byte_tokens and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replaced.items():
            piece = piece.replace(pattern, content)
        return piece.encode()


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a decoder of the tokenizers library, sequences in sequences flattened."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for each in decoder["decoders"] for step in _decoder_steps(each)]
    return [decoder]


def _replacements(steps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the replacements that decoding makes in a token."""
    found = {}
    for step in steps:
        if step["type"] == "Metaspace":
            found[step["replacement"]] = " "
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            found[step["pattern"]["String"]] = step["content"]
    return found


def _byte_level() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 characters stand for themselves, 256 and up for the other bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SENTENCEPIECE = {"\u2581": " "}


class StopScanner:
    """Passes text on up to the first stop sequence, which is `found`, and drops the rest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def add(self, text: str) -> str:
        """Return the text that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            first, self.found = min(found)
            shown, self._held = self._held[:first], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return the text that was held back and is no stop sequence."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the held text may begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
