"""The tokenizer of a store or checkpoint, from tokenizer.json, or from the sentencepiece model of a release."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from qmix.checkpoint.reader import TOKENIZER_FILES, TOKENIZERS, no_tokenizer
from qmix.errors import QmixError, StoreError
from qmix.files import read_json
from qmix.safetensors_header import AGAIN

CONFIG = "tokenizer_config.json"
TRIAL = "A <s>trial</s> of\n\ttokens: é 中 🦉"
BPE = 2  # sentencepiece's number of a model type


class _Config(msgspec.Struct):
    add_bos_token: bool | None = None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a store or checkpoint; nothing is looked up elsewhere, no code of it is run.

    Raises StoreError naming the file.
    """
    name = next((name for name in TOKENIZERS if (directory / name).is_file()), None)
    if name is None:
        there = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        raise StoreError(no_tokenizer(str(directory), there))
    for file in TOKENIZER_FILES:
        if file.endswith(".json") and (directory / file).is_file():
            read_json(directory / file, dict[str, Any], StoreError, AGAIN)
    with _named(directory, name):
        if name == "tokenizer.json":
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = _from_sentencepiece(directory / name)
        _try_out(tokenizer)
    return tokenizer


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Return what gives the ids that sentencepiece does, `<s>` first unless tokenizer_config.json says otherwise."""
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
    stated = read_json(config, _Config, StoreError, AGAIN).add_bos_token if config.is_file() else None
    tokenizer = LlamaTokenizer.from_pretrained(path.parent, local_files_only=True, add_bos_token=stated is not False)
    # LlamaTokenizer puts no space before a text that begins with one, sentencepiece always does
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _try_out(tokenizer: Any) -> None:
    """Encode and decode a text: some damage shows only then."""
    tokenizer.decode(tokenizer(TRIAL)["input_ids"])


@contextmanager
def _named(directory: Path, name: str) -> Iterator[None]:
    """Turn whatever the libraries raise about the files of a tokenizer into one line that names the file."""
    try:
        with _panics_muted():
            yield
    except (QmixError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        at_fault = CONFIG if (directory / CONFIG).is_file() and _is_sound(directory / name) else name
        raise StoreError(f"{directory / at_fault}: the tokenizer cannot be used ({reason[:200]}); {AGAIN}") from None


def _is_sound(path: Path) -> bool:
    """Say whether a tokenizer.json works by itself."""
    try:
        with _panics_muted():
            Tokenizer.from_file(str(path)).encode(TRIAL)
        return True
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return False


@contextmanager
def _panics_muted() -> Iterator[None]:
    """Keep what the Rust library writes about a panic, straight to the process's stderr, away from the user."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
