"""Token ids to text, and stop sequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qmix.text import Detokenizer, StopScanner


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny, local_files_only=True)


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def stream(tokenizer, prompt, ids):
    detokenizer = Detokenizer(decoder(tokenizer), prompt)
    return [detokenizer.add(token) for token in ids] + [detokenizer.finish()]


def test_a_word_after_a_prompt_keeps_its_space(tokenizer):
    prompt = tokenizer("open a")["input_ids"]
    new = tokenizer("terminal", add_special_tokens=False)["input_ids"]  # begins with the space mark
    assert "".join(stream(tokenizer, prompt, new)) == " terminal"


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer("x\U0001f600y", add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, [1], ids)
    assert "\ufffd" not in "".join(pieces)
    assert "\U0001f600" in [piece.strip("xy ") for piece in pieces]  # four byte tokens, one piece


def test_bytes_that_never_become_a_character_are_not_lost(tokenizer):
    first_byte = tokenizer.convert_tokens_to_ids("<0xF0>")
    assert stream(tokenizer, [1], [first_byte])[-1] == "\ufffd"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40))
def test_the_pieces_add_up_to_the_text(tokenizer, text):
    prompt = tokenizer("To install")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = decoder(tokenizer)
    assert "".join(stream(tokenizer, prompt, ids)) == decode(prompt + ids)[len(decode(prompt)) :]


def scan(stops, *pieces):
    scanner = StopScanner(stops)
    return [scanner.add(piece) for piece in pieces] + [scanner.finish()], scanner.stopped


def test_text_before_a_stop_is_shown_and_the_stop_is_not():
    assert scan(["END"], "one END two") == (["one ", ""], True)


def test_a_stop_split_over_pieces_is_found_and_its_start_is_held_back():
    assert scan(["END"], "one E", "N", "D two") == (["one ", "", "", ""], True)


def test_what_only_looked_like_a_stop_is_shown():
    assert scan(["END"], "one E", "NX", "EN") == (["one ", "ENX", "", "EN"], False)


def test_the_earliest_of_several_stops_counts():
    assert scan(["two", "e t"], "one two") == (["on", ""], True)


def test_without_stops_text_passes_at_once():
    assert scan([], "a", "b") == (["a", "b", ""], False)


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4), st.integers(1, 3))
def test_chunking_never_changes_what_is_shown(text, stop, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    shown, stopped = scan([stop], *pieces)
    assert "".join(shown) == text.split(stop)[0]
    assert stopped == (stop in text)
