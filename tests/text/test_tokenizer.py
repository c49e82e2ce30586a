"""Tokenizers that are damaged, in every way that was found to make one panic or fail; text that is none."""

from __future__ import annotations

import json
import shutil

import pytest

from qmix.errors import StoreError, UsageError
from qmix.text.tokenizer import decode, encode, load_tokenizer


@pytest.fixture
def damaged(tiny, tmp_path):
    """Make the embedded tokenizer's directory with a function's change to the content of one file."""

    def make(name, change):
        directory = tmp_path / "model"
        directory.mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny / file, directory)
        before = (directory / name).read_text()
        after = change(json.loads(before)) if name.endswith(".json") else change(before)
        (directory / name).write_bytes(after if isinstance(after, bytes) else json.dumps(after).encode())
        return directory

    return make


def without(*path):
    def change(content):
        at = content
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return content

    return change


def with_value(value, *path):
    def change(content):
        at = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return content

    return change


DAMAGES = {
    "panics at the first text": ("tokenizer.json", without("post_processor", "special_tokens", "<s>")),
    "panics as it is loaded": ("tokenizer.json", with_value("\ud7ff", "model", "continuing_subword_prefix")),
    "no model": ("tokenizer.json", without("model")),
    "a merge of what is not there": ("tokenizer.json", with_value([["zz", "\u2603"]], "model", "merges")),
    "a list": ("tokenizer.json", lambda content: []),
    "cut short": ("tokenizer.json", lambda content: json.dumps(content)[:-1000].encode()),
    "not UTF-8": ("tokenizer.json", lambda content: b'{"version": "\xff"}'),
    "nested too deeply": ("tokenizer_config.json", lambda content: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number for a token": ("tokenizer_config.json", with_value({"a": 1}, "bos_token")),
    "a list for the configuration": ("tokenizer_config.json", lambda content: [content]),
    "a template that is not UTF-8": ("chat_template.jinja", lambda content: b"{{ '\xff' }}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused_by_the_name_of_its_file(damaged, damage, capfd):
    name, change = DAMAGES[damage]
    directory = damaged(name, change)
    with pytest.raises(StoreError) as caught:
        load_tokenizer(directory)
    assert str(caught.value).startswith(f"{directory / name}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "of a panic there is one line, qmix's"


def test_what_others_print_while_a_tokenizer_loads_is_not_lost(tiny, monkeypatch, capfd):
    from transformers import AutoTokenizer

    def loud(*arguments, **options):
        import os

        os.write(2, b"from elsewhere\n")
        return real(*arguments, **options)

    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loud)
    load_tokenizer(tiny)
    assert capfd.readouterr().err == "from elsewhere\n"


def test_a_panic_in_use_names_the_tokenizer(damaged, tiny, monkeypatch):
    broken = damaged("tokenizer.json", without("post_processor", "special_tokens", "<s>"))
    monkeypatch.setattr("qmix.text.tokenizer.TRIAL", "")
    tokenizer = load_tokenizer(tiny)
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_file(str(broken / "tokenizer.json"))
    with pytest.raises(StoreError, match=f"^{tiny}: its tokenizer fails"):
        encode(tokenizer, "Hello")


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_half_a_surrogate_pair_is_no_text(tiny, text):
    with pytest.raises(UsageError, match="not UTF-8"):
        encode(load_tokenizer(tiny), text)


def test_texts_come_back(tiny):
    tokenizer = load_tokenizer(tiny)
    for text in ("Hello w\u00f6rld", "\U0001f600 a  b\n", "\x00\x01"):
        ids = encode(tokenizer, text)
        assert ids == tokenizer(text)["input_ids"]
        assert decode(tokenizer, ids) == text
