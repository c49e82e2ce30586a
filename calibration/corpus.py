"""Texts for calibration: those of the package, or a user's own.

The files in `texts/`, one for each language that Mixtral is trained for, hold documents of many kinds (stories,
explanations, dialogue, letters, code), so that measurements do not describe one kind of text only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from qmix.errors import UsageError, arg
from qmix.files import read_text

LANGUAGES = ("en", "fr", "de", "es", "it")
TEXTS = Path(__file__).parent / "texts"
SEPARATOR = re.compile(r"^---[ \t]*$", re.MULTILINE)
SHORTEST = 2  # tokens of a passage: one predicts the other


@dataclass(frozen=True, slots=True)
class Document:
    """A text that shares no context with others. `language` is None if unknown."""

    language: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids of a text, or of a part of one, that run as one sequence."""

    language: str | None
    ids: list[int]


def bundled(languages: Sequence[str] = LANGUAGES) -> list[Document]:
    """Return the documents of the package, language by language. Raises UsageError."""
    for language in languages:
        if language not in LANGUAGES:
            raise UsageError(f"language {language!r}: no texts; choose from {', '.join(LANGUAGES)}")
    return [Document(language, text) for language in languages for text in _texts(TEXTS / f"{language}.md")]


def alternating(documents: Sequence[Document]) -> list[Document]:
    """Return the first document of each language, then the second of each, and so on: any beginning is mixed."""
    by_language: dict[str | None, list[Document]] = {}
    for document in documents:
        by_language.setdefault(document.language, []).append(document)
    rounds = zip_longest(*by_language.values())
    return [document for row in rounds for document in row if document is not None]


def from_file(path: Path) -> list[Document]:
    """Return the documents of a user's file, separated by lines of `---`.

    Raises UsageError, naming the file, if it cannot be read, is not UTF-8, or holds no text.
    """
    return [Document(None, text) for text in _texts(path)]


def windows(passages: Sequence[Passage], length: int, tokens: int | None = None) -> list[Passage]:
    """Cut passages into windows of SHORTEST to `length` tokens, at most `tokens` in all.

    Raises UsageError if no window is left.
    """
    found: list[Passage] = []
    left = math.inf if tokens is None else tokens
    for passage in passages:
        for start in range(0, len(passage.ids), length):
            window = passage.ids[start : start + int(min(length, left))]
            if len(window) >= SHORTEST:
                found.append(Passage(passage.language, window))
                left -= len(window)
    if not found:
        raise UsageError(f"the text has no token to predict; give a longer text, or more {arg('tokens')}")
    return found


def _texts(path: Path) -> list[str]:
    content = read_text(path)
    texts = [stripped for text in SEPARATOR.split(content) if (stripped := text.strip())]
    if not texts:
        raise UsageError(f"{path}: has no text; give another file")
    return texts
