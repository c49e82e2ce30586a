"""The tokenizer of a release is sentencepiece's own; what is damaged or of another kind is named in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece_models import write_tokenizer_model

from qmix.errors import StoreError
from qmix.text.tokenizer import load_tokenizer

PLAIN = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="<[\0")) | st.text("ab \n▁é🦉")


@pytest.fixture(scope="module")
def release(tmp_path_factory, tiny) -> Path:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    directory = tmp_path_factory.mktemp("release")
    write_tokenizer_model(tiny, directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def both(release, tiny) -> tuple[Any, Any, Any]:
    """Return qmix's tokenizer of tokenizer.model, sentencepiece's own, and that of a tokenizer.json alike."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(str(release / "tokenizer.model"))
    return load_tokenizer(release), theirs, load_tokenizer(tiny)


@given(text=PLAIN)
def test_a_tokenizer_model_gives_the_ids_and_text_of_sentencepiece(both, text: str) -> None:
    ours, theirs, _ = both
    ids = ours(text, verbose=False)["input_ids"]
    assert ids == theirs.encode(text, add_bos=True)
    assert ours.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == theirs.decode(ids)


@pytest.mark.parametrize("text", ["Click the button to", " a", "", "[INST] hi [/INST]", "</s>x", "été 中国 🦉"])
def test_a_tokenizer_model_gives_what_the_tokenizer_json_gives(both, text: str) -> None:
    """Tokens that are written out in a text included, where sentencepiece has a view of its own."""
    ours, _, converted = both
    assert ours(text)["input_ids"] == converted(text)["input_ids"]
    assert ours(text)["input_ids"][0] == ours.bos_token_id == 1


@pytest.mark.parametrize(("stated", "first"), [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, 2071)])
def test_bos_comes_first_unless_the_config_says_no(tmp_path, release, stated: dict, first: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes((release / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert load_tokenizer(tmp_path)("Click the button")["input_ids"][0] == first


@pytest.mark.parametrize("module", ["sentencepiece", "google.protobuf"])
def test_without_sentencepiece_the_extra_is_named(tmp_path, monkeypatch, module: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"a model")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StoreError) as caught:
        load_tokenizer(tmp_path)
    told = "takes the package sentencepiece; pip install 'qmix-moe[sentencepiece]'"
    assert str(caught.value) == f"{tmp_path}/tokenizer.model: {told}"


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "unigram", "changes the text"])
def test_a_tokenizer_model_of_no_use_is_named(tmp_path, release, damage: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    raw = (release / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(raw)
    if damage == "unigram":
        model.trainer_spec.model_type = 1
    if damage == "changes the text":
        model.normalizer_spec.precompiled_charsmap = b"x"
    contents = {"cut": raw[:-1000], "garbage": b"version", "empty": b""}
    (tmp_path / "tokenizer.model").write_bytes(contents.get(damage, model.SerializeToString()))
    assert refusal(tmp_path).startswith(f"{tmp_path}/tokenizer.model: the tokenizer cannot be used (")


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ([], "copy the model's own there"),
        (["tokenizer.model.v1", "tokenizer.model.v3"], "copy its tokenizer.model.v3 to tokenizer.model"),
        (["tekken.json"], "and qmix does not read its tekken.json; copy the model's own tokenizer.json there"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(tmp_path, there: list[str], told: str) -> None:
    for name in there:
        (tmp_path / name).write_text("{}")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: has no tokenizer.json or tokenizer.model")
    assert message.endswith(told)


def refusal(directory: Path) -> str:
    with pytest.raises(StoreError) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def panicking(content: dict) -> dict:
    """The library panics, which is no Exception of Python, when it encodes with this."""
    content["post_processor"]["special_tokens"] = {}
    return content


DAMAGES = {
    "panic": panicking,
    "another panic": lambda content: content | {"model": content["model"] | {"continuing_subword_prefix": "zzz"}},
    "no vocabulary": lambda content: content | {"model": content["model"] | {"vocab": {}}},
    "no model": lambda content: {key: value for key, value in content.items() if key != "model"},
    "a list": lambda content: [content],
    "a number": lambda content: content | {"added_tokens": 5},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_json_is_named_in_one_line(tmp_path, tiny, capfd, damage: str) -> None:
    content = json.loads((tiny / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(DAMAGES[damage](content)))
    (tmp_path / "tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    assert refusal(tmp_path).startswith(f"{tmp_path}/tokenizer.json: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spoilt", ['{"model_max_length": 1e999}', "[]", '{"added_tokens_decoder": {"x": 5}}', "{"])
def test_a_damaged_tokenizer_config_is_named(tmp_path, tiny, spoilt: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(spoilt)
    assert refusal(tmp_path).startswith(f"{tmp_path}/tokenizer_config.json: ")


def test_code_that_a_tokenizer_config_names_is_refused_and_not_asked_for(tmp_path, tiny, monkeypatch) -> None:
    """A question about running it would wait at the terminal."""
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert "tokenizer_config.json: the tokenizer cannot be used (" in refusal(tmp_path)
