"""The package's texts are of their languages and kinds, and a user's file is split as documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibration.corpus import LANGUAGES, TEXTS, Document, Passage, alternating, bundled, from_file, windows
from qmix.errors import UsageError

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LISTED = re.compile(r"^(?:\d+\.|[-*]) \S", re.MULTILINE)
SPOKEN = re.compile(r'^[—–«»„“"]', re.MULTILINE)
FUNCTION_WORDS = {  # frequent ones; no word is in two of the lists
    "en": "the and of that it with was you for have this are not from they which",
    "fr": "les des est et du au ne dans une pas qui sur avec vous pour elle",
    "de": "der die und das ist nicht ein den mit von zu auf sich es dem auch",
    "es": "el los que y las con por sin se lo su más como pero para del",
    "it": "il di che è non della gli una sono per nel anche più dei ma alla",
}


def prose(text: str) -> str:
    return FENCED.sub("", text)


def words(text: str) -> list[str]:
    return prose(text).split()


def texts(language: str) -> list[str]:
    return [document.text for document in bundled((language,))]


def share(language: str, sample: list[str]) -> float:
    known = set(FUNCTION_WORDS[language].split())
    return sum(word.lower().strip(".,;:!?«»„“”—()") in known for word in sample) / len(sample)


@pytest.mark.parametrize("language", LANGUAGES)
def test_enough_text_in_documents_of_some_length(language):
    documents = texts(language)
    assert len(documents) >= 10
    assert sum(len(words(text)) for text in documents) >= 2000
    assert all(80 <= len(words(text)) <= 350 for text in documents)


@pytest.mark.parametrize("language", LANGUAGES)
def test_documents_of_several_kinds(language):
    documents = texts(language)
    assert all(text.count("```") == 2 * len(FENCED.findall(text)) for text in documents)
    assert sum(bool(FENCED.search(text)) for text in documents) == 1
    assert any(len(LISTED.findall(prose(text))) >= 5 for text in documents)
    assert any(len(SPOKEN.findall(prose(text))) >= 10 for text in documents)
    assert any("|\n|:--" in text for text in documents)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_document_is_in_its_language(language):
    for text in texts(language):
        shares = {other: share(other, words(text)) for other in LANGUAGES}
        assert max(shares, key=shares.__getitem__) == language, text[:80]
    whole = [word for text in texts(language) for word in words(text)]
    assert share(language, whole) > 0.1


def test_a_programming_language_is_shown_once():
    found = [FENCED.search("\n\n".join(texts(language))) for language in LANGUAGES]
    assert len({match[1] for match in found if match}) == len(LANGUAGES)
    assert all(20 <= match[2].count("\n") <= 45 for match in found if match)


def test_all_of_them_in_order_and_none_twice():
    documents = bundled()
    assert list(dict.fromkeys(document.language for document in documents)) == list(LANGUAGES)
    assert len({document.text for document in documents}) == len(documents)
    assert bundled(("it", "en")) == bundled(("it",)) + bundled(("en",))
    assert sorted(path.stem for path in TEXTS.iterdir()) == sorted(LANGUAGES)


def test_a_language_without_texts():
    with pytest.raises(UsageError, match=r"^language 'xx': .*en, fr, de, es, it$"):
        bundled(("en", "xx"))


def test_documents_written_to_a_file_are_read_from_it(tmp_path):
    path = tmp_path / "own.txt"
    own = [Document(None, document.text) for document in bundled()]
    path.write_text("\n\n---\n\n".join(document.text for document in own), encoding="utf-8")
    assert from_file(path) == own


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("One text,\n\nof two paragraphs.\n", ["One text,\n\nof two paragraphs."]),
        ("---\nfirst\n---\n\n---\nsecond\n---\n", ["first", "second"]),
        ("first\r\n---\r\nsecond\r\n", ["first", "second"]),
        ("\ufefffirst\n--- \nsecond", ["first", "second"]),
        ("a | b\n---|---\n1 | 2\n\n----\n - ---\n", ["a | b\n---|---\n1 | 2\n\n----\n - ---"]),
    ],
)
def test_what_parts_documents(tmp_path, content, expected):
    path = tmp_path / "own.txt"
    path.write_bytes(content.encode())
    assert [document.text for document in from_file(path)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; give a text file of at most 4 MiB"),
        (b"caf\xe9", "not UTF-8 text (byte 3); save it as UTF-8"),
        (b"", "has no text; give another file"),
        (b" \n---\n\n---\n", "has no text; give another file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        from_file(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="Is a directory; give a text file"):
        from_file(tmp_path)


def test_an_endless_file_is_refused_by_its_size():
    with pytest.raises(UsageError, match="/dev/zero: larger than 4194304 bytes; give a text file of at most 4 MiB"):
        from_file(Path("/dev/zero"))


def test_alternating_takes_a_document_of_each_language_in_turn():
    documents = [
        Document("en", "a"),
        Document("en", "b"),
        Document("en", "c"),
        Document("fr", "d"),
        Document("it", "e"),
    ]
    assert "".join(document.text for document in alternating(documents)) == "adebc"
    assert [document.language for document in alternating(bundled())[:5]] == list(LANGUAGES)
    assert sorted(map(hash, alternating(bundled()))) == sorted(map(hash, bundled()))


def test_windows_cover_passages_and_stop_at_the_tokens_asked_for():
    passages = [Passage("en", list(range(10))), Passage("fr", [7]), Passage(None, list(range(5)))]
    found = windows(passages, 4)
    assert [passage.ids for passage in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert [passage.language for passage in found] == ["en", "en", "en", None]
    assert [passage.ids for passage in windows(passages, 4, tokens=7)] == [[0, 1, 2, 3], [4, 5, 6]]
    with pytest.raises(UsageError, match="no token to predict"):
        windows([Passage(None, [5])], 4)
