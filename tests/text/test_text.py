"""Token ids to text, and stop sequences."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmix.batch.forms import Forms, Offsets, Told, told_by
from qmix.batch.request import CHAT, COMPLETION, Line
from qmix.engine.completion import BatchResult
from qmix.engine.sampler import Chosen
from qmix.text.detokenizer import Detokenizer, StopScanner, TokenBytes


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


WORDS = ("naïve", "café", "日本", "👋🏽", "👩‍👩‍👧", "ß", "\u2581", " ", "\n", "x")
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def byte_level(tokenizer):
    """A vocabulary as GPT-2's: bytes in its alphabet, and pairs learnt from some text."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer, learnt.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=alphabet, special_tokens=["</s>"]
    )
    learnt.train_from_iterator(["a naïve café, a naïve word 👋 of 日本"] * 9, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=learnt, eos_token="</s>")
    found.add_tokens(["<tool>"])
    return found


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def vocabulary(request, tokenizer, byte_level):
    return tokenizer if request.param == "sentencepiece" else byte_level


@pytest.fixture(scope="module")
def parts(vocabulary):
    """The tokens of one byte, which may be a part of a character."""
    bytes_of = TokenBytes(vocabulary)
    return [token for token in range(len(vocabulary)) if len(bytes_of(token) or b"") == 1]


@given(data=st.data())
@settings(deadline=None)
def test_the_bytes_of_an_answers_tokens_are_its_text(vocabulary, parts, data):
    """Whatever the tokens, ends of text and halves of characters among them; the text has U+FFFD for what is none."""
    bytes_of = TokenBytes(vocabulary)
    prompt = vocabulary("To install")["input_ids"]
    written = vocabulary(data.draw(TEXTS), add_special_tokens=False)["input_ids"]
    any_token = st.sampled_from(parts) | st.integers(0, len(vocabulary) - 1)
    ids = data.draw(st.just(written) | st.lists(any_token, max_size=12))
    text = "".join(stream(vocabulary, prompt, ids))
    told = [bytes_of(token) for token in ids]
    joined = b"".join(each for each in told if each is not None)
    if ids == written:
        assert joined == text.encode()
    try:
        assert joined.decode() == text
    except UnicodeDecodeError:
        assert "\ufffd" in text
    special = set(vocabulary.all_special_ids)
    assert [each is None for each in told] == [token in special for token in ids]


def test_the_bytes_of_parts_of_characters_by_hand(tokenizer, byte_level):
    wave = [bytes([byte]) for byte in "👋".encode()]
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "👋".encode()]
    assert [TokenBytes(tokenizer)(token) for token in ids] == wave
    ids = [byte_level.convert_tokens_to_ids(character) for character in "ðŁĳĭ"]  # GPT-2's for F0 9F 91 8B
    assert [TokenBytes(byte_level)(token) for token in ids] == wave
    assert TokenBytes(tokenizer)(tokenizer.convert_tokens_to_ids("▁x")) == b" x"
    assert TokenBytes(byte_level)(byte_level.convert_tokens_to_ids("Ġa")) == b" a"
    assert TokenBytes(tokenizer)(tokenizer.eos_token_id) is None
    assert TokenBytes(tokenizer)(10**6) == b""  # a row of the head that is no token


def test_what_looks_like_a_byte_is_text_where_the_decoder_knows_no_bytes(byte_level):
    plain = Tokenizer(models.WordLevel({"<0x41>": 0, "a\u2581b": 1}, unk_token="<0x41>"))
    bytes_of = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=plain))
    assert [bytes_of(0), bytes_of(1)] == [b"<0x41>", "a\u2581b".encode()]
    assert TokenBytes(byte_level)(byte_level.convert_tokens_to_ids("<tool>")) == b"<tool>"


def told(*tokens: bytes | None) -> list[Told]:
    return [Told("", "", data) for data in tokens]


def offsets(tokens: list[Told]) -> list[int]:
    return list(map(Offsets(), tokens))


def test_offsets_are_characters_of_the_text_that_are_complete():
    assert offsets(told(b" a", b"\xf0\x9f", b"\x91\x8b", b"!", None, b"x")) == [0, 2, 2, 3, 4, 4]
    assert offsets(told(b"\xf0", b"a", b"b")) == [0, 0, 2]  # the text has U+FFFD, a, b
    assert offsets([]) == []


def test_tokens_are_told_by_text_and_by_a_name_of_their_own(tokenizer):
    tell = told_by(tokenizer)
    first, second = (tell(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")) for byte in (0xF0, 0x9F))
    assert first == Told("\ufffd", r"bytes:\xf0", b"\xf0")
    assert second.name == r"bytes:\x9f"
    assert tell(tokenizer.eos_token_id) == Told("</s>", "</s>", None)
    assert tell(tokenizer.convert_tokens_to_ids("▁x")) == Told(" x", " x", b" x")


def answered(tokenizer, line: Line, ids: list[int]) -> dict:
    """The choice of a batch's answer of these tokens, each with the next two as its likeliest."""
    prompt = tokenizer("To install")["input_ids"]
    tokens = [Chosen(token, -1.0, ((token, -1.0), (token + 1, -2.0), (token + 2, -3.0))) for token in ids]
    answer = BatchResult("".join(stream(tokenizer, prompt, ids)), ids, "length", len(prompt), "a", 0, tokens)
    forms = Forms("run", "model", 0, told_by(tokenizer))
    return json.loads(forms.answered(line, [answer]))["response"]["body"]["choices"][0]


def test_a_batchs_answers_tell_the_bytes_of_their_tokens(vocabulary):
    ids = vocabulary("a naïve 👋🏽", add_special_tokens=False)["input_ids"]
    chat = answered(vocabulary, Line("a", CHAT, [], [], {"logprobs": 3}), ids)
    told = chat["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in told).decode() == chat["message"]["content"]
    assert all(each["bytes"] == each["top_logprobs"][0]["bytes"] for each in told)
    assert sum(each["token"] == "\ufffd" for each in told) >= 3
    text = answered(vocabulary, Line("a", COMPLETION, [], [], {"logprobs": 3}), ids)
    assert [len(likeliest) for likeliest in text["logprobs"]["top_logprobs"]] == [3] * len(ids)  # no part is lost
    for name, offset in zip(text["logprobs"]["tokens"], text["logprobs"]["text_offset"], strict=True):
        assert name.startswith("bytes:") or text["text"][offset:].startswith(name)


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
