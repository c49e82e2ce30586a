"""The model's tokenizer. Each of its failures becomes one line that names its file.

transformers' tokenizers call Rust, which panics over damage that it does not expect. To Python such a panic is no
`Exception`, and it prints lines of its own first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import msgspec
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from qmix.checkpoint.reader import TOKENIZERS, no_tokenizer
from qmix.errors import QmixError, StoreError
from qmix.files import read_bounded, read_json
from qmix.text.detokenizer import check_text

CONFIG = "tokenizer_config.json"
JSON_FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
TEMPLATE_LIMIT = 2**20  # bytes; published ones have a few thousand
REMEDY = "put the model's own there"
TRIAL = "A <s>trial</s> of\n\ttokens: é 中 🦉"
BPE = 2  # sentencepiece's number of a model type
STDERR = 2


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a store or checkpoint, after a trial; nothing is fetched. Raises StoreError."""
    vocabulary = next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)
    if vocabulary is None:
        there = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        raise StoreError(no_tokenizer(str(directory), there))
    for name in JSON_FILES:
        if (directory / name).is_file():
            # the megabytes of a vocabulary are parsed by the tokenizer alone
            kind = dict[str, msgspec.Raw] if name == "tokenizer.json" else dict[str, Any]
            read_json(directory / name, kind, StoreError, REMEDY)
    if (template := directory / TEMPLATE).is_file():
        try:
            read_bounded(template, TEMPLATE_LIMIT, StoreError, REMEDY).decode()
        except UnicodeDecodeError as error:
            raise StoreError(f"{template}: not UTF-8 (byte {error.start + 1}); {REMEDY}") from None
    try:
        with _no_panic_lines(), _failures():
            if vocabulary.name == "tokenizer.json":
                tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            else:
                tokenizer = _from_sentencepiece(vocabulary)
            tokenizer.decode(tokenizer(TRIAL)["input_ids"])
    except _Failure as failure:
        raise StoreError(f"{_culprit(vocabulary)}: the tokenizer cannot be used ({failure}); {REMEDY}") from None
    return tokenizer


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the ids of sentencepiece, `<s>` first unless tokenizer_config.json says otherwise."""
    try:
        import google.protobuf  # noqa: F401 -- reads the file
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise StoreError(f"{path}: takes the package sentencepiece; pip install 'qmix-moe[sentencepiece]'") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != BPE or spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ValueError("not of a Mixtral: those are byte-pair models which leave the text as it is")
    config = path.with_name(CONFIG)
    stated = read_json(config, _Config, StoreError, REMEDY).add_bos_token if config.is_file() else None
    tokenizer = LlamaTokenizer.from_pretrained(path.parent, local_files_only=True, add_bos_token=stated is not False)
    # LlamaTokenizer puts no space before a text that begins with one, sentencepiece always does
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Return a text's ids, with the tokenizer's special tokens unless `add_special_tokens=False`.

    Raises UsageError where it is not valid text, StoreError where the tokenizer fails.
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
    """Turn any exception of a tokenizer into a StoreError that names it."""
    try:
        with _failures():
            yield
    except _Failure as failure:
        raise StoreError(f"{tokenizer.name_or_path}: its tokenizer fails ({failure}); {REMEDY}") from None


class _Config(msgspec.Struct):
    """Keys of tokenizer_config.json that qmix reads itself."""

    add_bos_token: bool | None = None


class _Failure(Exception):
    """A tokenizer's failure, in a few words."""


@contextmanager
def _failures() -> Iterator[None]:
    """Turn exceptions and panics into _Failure; qmix's own errors, and exceptions that end the program, pass."""
    try:
        yield
    except (QmixError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # pyo3's PanicException is no Exception
        lines = str(error).strip().splitlines()
        raise _Failure((lines[0] if lines else type(error).__name__)[:200]) from None


@contextmanager
def _no_panic_lines() -> Iterator[None]:
    """Keep a Rust panic's lines from stderr, since one line reports it; other output appears a little later."""
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


def _culprit(path: Path) -> Path:
    """Return the file that caused a tokenizer's failure: its vocabulary, or tokenizer_config.json."""
    config = path.with_name(CONFIG)
    if path.name == TOKENIZERS[0] and config.is_file():
        try:
            with _no_panic_lines(), _failures():
                bare = Tokenizer.from_file(str(path))
                bare.decode(bare.encode(TRIAL).ids)
            return config
        except _Failure:
            pass
    return path
