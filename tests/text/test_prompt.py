"""Prompts are refused before they are tokenised where they cannot fit, and only there."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.corpus import bundled
from qmix.text.prompt import PIECE, PromptEncoder, PromptTooLong, encoded_pieces, longest_token
from qmix.text.tokenizer import load_tokenizer

PARTS = ["a", " ", "word ", "To print a page, ", "ä", "中", "\n", "</s>", "123", "▁", "🙂", "automáticamente "]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture
def counted(tokenizer):
    """A tokenizer that notes the lengths of what it is given."""
    return Counted(tokenizer)


class Counted:
    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.lengths = tokenizer, []

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        return self.tokenizer(text, **options)

    def get_vocab(self):
        return self.tokenizer.get_vocab()


def test_the_longest_token_is_counted_in_the_bytes_that_it_stands_for(tokenizer):
    assert longest_token(tokenizer) == len(" automáticamente".encode()) == 17


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 1000)), min_size=1, max_size=8))
def test_what_fits_is_tokenised_as_a_whole_and_one_token_more_is_refused(tokenizer, parts):
    """Texts of up to some 130,000 characters, most of them longer than a piece."""
    text = "".join(part * count for part, count in parts)
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert PromptEncoder(tokenizer, len(whole) + 1, 10**6).ids(text) == whole
    with pytest.raises(PromptTooLong):
        PromptEncoder(tokenizer, len(whole), 10**6).ids(text)


@pytest.mark.parametrize("text", ["word " * 300_000, "a" * 30_000, " " * 34_000, "中" * 11_000], ids=len)
def test_what_is_too_long_is_tokenised_in_pieces_at_most(counted, text):
    with pytest.raises(PromptTooLong, match=f"the prompt is {len(text.encode())} bytes, too long"):
        PromptEncoder(counted, 2048, 2048).ids(text)
    assert max(counted.lengths, default=0) <= PIECE
    assert sum(counted.lengths) <= 2048 * 17


def test_advice_is_given_where_it_helps(tokenizer):
    for longest, told in ((2048, "shorten it, or give a larger context"), (100, "the model's longest; shorten it")):
        for text, size in (("a b " * 100, "202 tokens"), ("word " * 2000, "10000 bytes")):
            with pytest.raises(PromptTooLong) as raised:
                PromptEncoder(tokenizer, 100, longest).ids(text, "it")
            mark = ";" if longest > 100 else ","
            assert str(raised.value) == f"it is {size}, too long for a context of 100{mark} {told}"


def test_pieces_of_a_long_text_join_to_the_ids_of_the_whole(counted, tokenizer):
    text = "\n\n".join(document.text for document in bundled())
    assert len(text) > 10 * PIECE
    found = list(encoded_pieces(counted, text))
    assert list(chain(*found)) == tokenizer(text, verbose=False)["input_ids"]
    assert max(counted.lengths) <= PIECE
    assert len(found) > 10


@pytest.mark.parametrize(
    "text", ["", "a", "a" * 3 * PIECE, " " * 3 * PIECE, "a " * PIECE, "a  " * PIECE, "\n" * 2 * PIECE]
)
def test_pieces_leave_nothing_out(tokenizer, text):
    ids = list(chain(*encoded_pieces(tokenizer, text)))
    shown = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert shown.replace(" ", "") == text.replace(" ", "")
    assert len(ids) == pytest.approx(len(tokenizer(text, verbose=False)["input_ids"]), abs=8)
