"""Checkpoints that only transformers can refuse: before the first byte is quantised, and by the name of their file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint, write_mistral
from stores import make_model, make_store

import qmix.engine.resolve
from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.engine.usable import check_usable
from qmix.errors import CheckpointError
from qmix.model.build import mixtral_config

VOCABULARY = 4096  # tiny's


@pytest.fixture
def model(tmp_path, tiny) -> Path:
    config = TINY_CONFIG | {"vocab_size": VOCABULARY}
    directory = write_checkpoint(tmp_path / "model", random_weights(config), config, tokenizer=tiny)
    shutil.copy(tiny / "generation_config.json", directory)
    return directory


def changed(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"} | settings}


REFUSED = {
    "pad token": ("config.json", {"pad_token_id": VOCABULARY}, "pad_token_id 4096 is outside the vocabulary of 4096"),
    "pad token below": ("config.json", {"pad_token_id": -VOCABULARY - 1}, "Padding_idx"),
    "bos token": ("config.json", {"bos_token_id": "<s>"}, "bos_token_id"),
    "rope type": ("config.json", rope(rope_type="nonsense"), "there is no 'nonsense'"),
    "rope list": ("config.json", {"rope_parameters": [1]}, "rope_parameters"),
    "rope theta": ("config.json", rope(rope_theta=0), "frequencies that are not finite"),
    "rope theta below": ("config.json", rope(rope_theta=-5), "frequencies that are not finite"),
    "rope theta null": ("config.json", rope(rope_theta=None), "NoneType"),
    "rope factor": ("config.json", rope(rope_type="linear", factor="a"), "str"),
    "yarn": ("config.json", rope(rope_type="yarn"), "factor"),
    "activation": ("config.json", {"hidden_act": "nope"}, "hidden_act 'nope' is not an activation of transformers"),
    "activation type": ("config.json", {"hidden_act": 3}, "hidden_act"),
    "temperature": ("generation_config.json", {"temperature": "warm"}, "temperature"),
    "top p": ("generation_config.json", {"top_p": [0.9]}, "top_p"),
    "tokenizer": ("tokenizer.json", {"added_tokens": 5}, "tokenizer cannot be used"),
    "tokenizer panic": ("tokenizer.json", {"model": {}}, "tokenizer cannot be used"),
    "tokenizer config": ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}, "tokenizer cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_the_name_of_the_checkpoints_own_file(model: Path, case: str) -> None:
    file, changes, told = REFUSED[case]
    changed(model / file, **changes)
    with pytest.raises(CheckpointError) as caught:
        check_usable(open_checkpoint(LocalSource(model)), "bf16")
    message = str(caught.value)
    assert message.startswith(f"{model / file}: ")
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize("command", [("quantize", "model", "new"), ("generate", "x", "-m", "model", "--ram", "1GiB")])
@pytest.mark.parametrize("case", ["pad token", "tokenizer", "temperature"])
def test_nothing_is_quantised_then(qmix, first_use, model: Path, case: str, command: tuple[str, ...]) -> None:
    file, changes, told = REFUSED[case]
    changed(model / file, **changes)

    def there() -> set[Path]:
        found = {*first_use.cache.rglob("*"), *model.parent.iterdir()}
        return {path for path in found if not path.name.startswith("interpreter-")}  # measured of Python

    before = there()
    done = qmix(*command, cwd=model.parent)
    lines = [line for line in done.lines if not line.startswith("measuring the memory of Python")]  # once more
    assert (done.status, done.out, len(lines)) == (1, "", 1)
    assert lines[0].startswith(f"qmix: model/{file}: ")
    assert told in lines[0]
    assert there() == before


def test_params_of_a_release_are_named(tmp_path: Path) -> None:
    directory = write_mistral(tmp_path / "m", random_weights(TINY_CONFIG), TINY_CONFIG)
    changed(directory / "params.json", rope_theta=0)
    with pytest.raises(CheckpointError, match=rf"^{directory}/params.json: transformers refuses it"):
        check_usable(open_checkpoint(LocalSource(directory)), "bf16")


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tekken.json"])
def test_a_tokenizer_of_another_kind_is_refused_before(qmix, model: Path, name: str) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    (model / name).write_text("{}")
    for command in (("quantize", "model", "new"), ("generate", "x", "-m", "model")):
        done = qmix(*command, cwd=model.parent)
        assert (done.status, len(done.lines)) == (1, 1)
        assert done.err.startswith("qmix: model: has no tokenizer.json or tokenizer.model")
        assert name in done.err
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_release_without_sentencepiece_is_refused_before(model: Path, tmp_path, monkeypatch, isolated_home) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    (model / "tokenizer.model").write_bytes(b"a model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(CheckpointError) as caught:
        qmix.engine.resolve.prepare_store(model)
    told = "takes the package sentencepiece; pip install 'qmix-moe[sentencepiece]'"
    assert str(caught.value) == f"{model}/tokenizer.model: {told}"
    assert not list(isolated_home.rglob("*.partial"))


def test_a_sound_checkpoint_passes_and_keeps_its_identity(model: Path) -> None:
    """transformers fills in what rope settings leave out, in the dictionary that it is given."""
    changed(model / "config.json", rope_parameters={"rope_type": "default"})
    checkpoint = open_checkpoint(LocalSource(model))
    config = json.loads(json.dumps(checkpoint.config))
    check_usable(checkpoint, "bf16")
    assert checkpoint.config == config


# What a config.json may hold besides, left there by training, by other programs, or for transformers alone.
BESIDES = {
    "return_dict": False,
    "torchscript": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "use_cache": False,
    "_attn_implementation": "eager",
    "attn_implementation": "nonsense",
    "_attn_implementation_internal": "flex_attention",
    "experts_implementation": "grouped_mm",
    "_experts_implementation": "nonsense",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "auto_map": {"AutoModelForCausalLM": "own.Own"},
    "torch_dtype": "nonsense",
    "dtype": "torch.float64",
    "architectures": ["OwnForCausalLM"],
    "router_jitter_noise": 0.5,
    "router_aux_loss_coef": 5,
    "attention_dropout": 0.9,
    "initializer_range": "x",
    "num_experts": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {},
    "is_encoder_decoder": True,
    "is_decoder": False,
    "chunk_size_feed_forward": 3,
    "pruned_heads": {"0": [1]},
    "problem_type": "nonsense",
    "num_labels": -1,
    "id2label": {"a": 1},
    "temperature": 9.0,
    "do_sample": True,
    "max_length": 3,
    "min_length": 50,
    "forced_bos_token_id": 7,
    "bad_words_ids": [[5]],
    "to_dict": 1,
    "get_text_config": None,
    "name_or_path": 5,
    "transformers_version": 4,
    "gradient_checkpointing": True,
    "pretraining_tp": 2,
    "tie_encoder_decoder": True,
    "ep_size": 8,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("besides")
    return make_store(write_checkpoint(directory / "m", random_weights(TINY_CONFIG), TINY_CONFIG), directory / "q")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def continuation(store: Any) -> list[int]:
    made = make_model(store)
    ids = torch.arange(5, 13)[None]
    return made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0].tolist()


@pytest.mark.parametrize("key", BESIDES)
def test_a_key_of_no_meaning_for_the_model_changes_nothing(key: str) -> None:
    plain, other = (mixtral_config(content, Path("c")) for content in (TINY_CONFIG, TINY_CONFIG | {key: BESIDES[key]}))
    assert vars(other) == vars(plain)


def test_all_of_them_together_give_the_same_text(store: Any, one_thread: None) -> None:
    plain = continuation(store)
    assert len(plain) > 8
    assert continuation(replace(store, config=store.config | BESIDES)) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 0.5),
        ("hidden_act", "relu"),
        ("rope_parameters", {"rope_theta": 2.0, "rope_type": "default"}),
        ("sliding_window", 2),
    ],
)
def test_what_a_config_says_of_the_model_is_taken(store: Any, one_thread: None, key: str, value: Any) -> None:
    """The tests above would not fail if all were left out."""
    ids = torch.arange(5, 13)[None]
    changed = make_model(replace(store, config=store.config | {key: value}))
    assert not torch.equal(changed(ids).logits, make_model(store)(ids).logits)
