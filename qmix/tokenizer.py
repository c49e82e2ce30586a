"""The model's tokenizer, loaded and used so that whatever it does wrong is one line that names its file.

transformers' tokenizers end in Rust, which panics over damage that it does not expect. Such a panic is no `Exception`
for Python, and prints its own lines first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import msgspec
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qmix.checkpoint.reader import TOKENIZERS
from qmix.errors import QmixError, StoreError, UsageError
from qmix.files import read_bounded, read_json

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
TEMPLATE_LIMIT = 2**20  # bytes; those in use take a few thousand
REMEDY = "put the model's own there"
TRIAL = "Hello w\u00f6rld\n"
STDERR = 2


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a store or checkpoint, tried once; nothing is looked up elsewhere. Raises StoreError."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise StoreError(f"{directory}: has no {' or '.join(TOKENIZERS)}; {REMEDY}")
    for name in JSON_FILES:
        if (directory / name).is_file():
            read_json(directory / name, dict[str, msgspec.Raw], StoreError, REMEDY)
    if (template := directory / TEMPLATE).is_file():
        try:
            read_bounded(template, TEMPLATE_LIMIT, StoreError, REMEDY).decode()
        except UnicodeDecodeError as error:
            raise StoreError(f"{template}: not UTF-8 (byte {error.start + 1}); {REMEDY}") from None
    try:
        with _no_panic_lines(), _failures():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            tokenizer.decode(tokenizer(TRIAL)["input_ids"])
    except _Failure as failure:
        raise StoreError(f"{_culprit(directory)}: cannot be used as a tokenizer ({failure}); {REMEDY}") from None
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Return a text's ids, with the tokenizer's special tokens but for `add_special_tokens=False`.

    Raises UsageError where it is no text, StoreError where the tokenizer fails.
    """
    check_text(text)
    with tokenizing(tokenizer):
        return list(tokenizer(text, verbose=False, **options)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ids, without special tokens and otherwise as it is. Raises StoreError."""
    with tokenizing(tokenizer):
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def tokenizing(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn whatever a tokenizer raises while it is used into a StoreError that names it."""
    try:
        with _failures():
            yield
    except _Failure as failure:
        raise StoreError(f"{tokenizer.name_or_path}: its tokenizer fails ({failure}); {REMEDY}") from None


def check_text(text: str) -> None:
    """Raise UsageError where a text holds half of a surrogate pair, which bytes that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"not UTF-8 text (character {error.start + 1}); give text in UTF-8") from None


class _Failure(Exception):
    """What a tokenizer raised, in a few words."""


@contextmanager
def _failures() -> Iterator[None]:
    """Turn exceptions and panics into _Failure; what ends the program, and errors that say all, pass."""
    try:
        yield
    except (QmixError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # pyo3's PanicException is no Exception
        lines = str(error).strip().splitlines()
        raise _Failure((lines[0] if lines else type(error).__name__)[:200]) from None


@contextmanager
def _no_panic_lines() -> Iterator[None]:
    """Keep from stderr what Rust prints of a panic that is told in one line anyhow; all else appears, a bit later."""
    try:
        before = os.dup(STDERR)
    except OSError:  # closed: nothing is printed
        yield
        return
    with TemporaryFile() as printed:
        os.dup2(printed.fileno(), STDERR)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(before, STDERR)
            os.close(before)
            if not failed:
                printed.seek(0)
                os.write(STDERR, printed.read())


def _culprit(directory: Path) -> Path:
    """Return the file that a tokenizer's failure is due to: its vocabulary, or what is said about its use."""
    path = next(directory / name for name in TOKENIZERS if (directory / name).is_file())
    if path.name == TOKENIZERS[0] and (directory / "tokenizer_config.json").is_file():
        try:
            with _no_panic_lines(), _failures():
                bare = Tokenizer.from_file(str(path))
                bare.decode(bare.encode(TRIAL).ids)
            return directory / "tokenizer_config.json"
        except _Failure:
            pass
    return path
