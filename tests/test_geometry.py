"""The two published Mixtrals by hand, and every way in which a config can be wrong."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from checkpoints import TINY_CONFIG, random_weights

from qmix.checkpoint.naming import expected_weights
from qmix.errors import CheckpointError
from qmix.geometry import Geometry, config_from_params

CONFIG_8X22B = {
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
CONFIG_8X7B = CONFIG_8X22B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
}
PARAMS_8X22B = {
    "dim": 6144,
    "n_layers": 56,
    "head_dim": 128,
    "hidden_dim": 16384,
    "n_heads": 48,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "rope_theta": 1000000,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}


def parameters(geometry: Geometry) -> int:
    return sum(prod(shape) for _, shape in expected_weights(geometry))


def dense_parameters(geometry: Geometry) -> int:
    return sum(prod(shape) for shape in geometry.dense_tensors.values())


def test_8x22b_has_the_published_numbers() -> None:
    geometry = Geometry.from_config(CONFIG_8X22B)
    assert geometry.head_dim == 128
    # an expert: 3 x 6144 x 16384; a layer without them: q and o 6144 x 6144, k and v 1024 x 6144, gate, norms
    assert sum(prod(shape) for shape in geometry.expert_matrices.values()) == 301_989_888
    assert parameters(geometry) == 140_620_634_112
    assert 2 * parameters(geometry) == 281_241_268_224  # the payload of the published shards
    assert len(dict(expected_weights(geometry))) == geometry.num_weights == 1739
    assert geometry.num_records == 448
    layer = 2 * 6144 * 6144 + 2 * 1024 * 6144 + 8 * 6144 + 2 * 6144
    assert 2 * dense_parameters(geometry) == 2 * (56 * layer + 2 * 32000 * 6144 + 6144) == 10_658_328_576
    assert geometry.kv_bytes_per_token == 2 * 56 * 8 * 128 * 2 == 229_376


def test_8x7b_has_the_published_numbers() -> None:
    geometry = Geometry.from_config(CONFIG_8X7B)
    assert parameters(geometry) == 46_702_792_704
    assert 2 * dense_parameters(geometry) == 3_211_272_192
    assert geometry.num_records == 256
    assert geometry.kv_bytes_per_token == 131_072


def test_the_mistral_release_describes_the_same_model() -> None:
    config = config_from_params(PARAMS_8X22B)
    assert Geometry.from_config(config) == Geometry.from_config(CONFIG_8X22B)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("extra", "field", "value"),
    [
        ({"max_seq_len": 1000}, "max_position", 1000),
        ({"max_position_embeddings": 2000}, "max_position", 2000),
        ({"sliding_window": 512}, "sliding_window", 512),
        ({"tied_embeddings": True}, "tie_embeddings", True),
    ],
)
def test_optional_params_of_the_mistral_release_are_taken_over(extra: dict, field: str, value: Any) -> None:
    assert getattr(Geometry.from_config(config_from_params(PARAMS_8X22B | extra)), field) == value


def test_shapes_are_those_of_a_checkpoint() -> None:
    config = TINY_CONFIG | {"head_dim": 24, "num_local_experts": 3}
    want = {name: tuple(weight.shape) for name, weight in random_weights(config).items()}
    assert dict(expected_weights(Geometry.from_config(config))) == want


def test_tied_embeddings_leave_the_head_out() -> None:
    untied = Geometry.from_config(TINY_CONFIG)
    tied = Geometry.from_config(TINY_CONFIG | {"tie_word_embeddings": True})
    assert untied.dense_tensors.keys() - tied.dense_tensors.keys() == {"lm_head.weight"}


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    from transformers import MixtralConfig

    required = {key: CONFIG_8X7B[key] for key in CONFIG_8X7B if key not in ("rope_theta", "rms_norm_eps")}
    for key in ("num_key_value_heads", "max_position_embeddings", "sliding_window", "tie_word_embeddings"):
        del required[key]
    theirs = MixtralConfig(**{key: value for key, value in required.items() if key != "model_type"})
    geometry = Geometry.from_config(required)
    assert geometry.num_kv_heads == theirs.num_key_value_heads
    assert geometry.max_position == theirs.max_position_embeddings
    assert geometry.sliding_window == theirs.sliding_window
    assert geometry.tie_embeddings == theirs.tie_word_embeddings
    assert Geometry.from_config(required | {"num_key_value_heads": None}).num_kv_heads == 32


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "head_dim",
)
MAY_BE_NULL = ("num_key_value_heads", "sliding_window", "head_dim")
BAD_CONFIGS = [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": None}, "model_type is None"),
    ({"per_layer_config": {"0": {"num_experts_per_tok": 1}}}, "per_layer_config: qmix runs only models whose"),
    *(({key: value}, f"{key} must be a whole number above zero, not {value!r}") for key in SIZES for value in (0, -1)),
    *(
        ({key: value}, f"{key}: expected int{' | null' * (key in MAY_BE_NULL)}, got {kind}")
        for key in SIZES
        for value, kind in ((2.5, "float"), ("64", "str"), (True, "bool"), ([1], "array"))
    ),
    *(({key: None}, f"{key}: expected int, got null") for key in SIZES if key not in MAY_BE_NULL),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected float, got str"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected float >= 0"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected bool | null, got str"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
    ({"num_experts_per_tok": 9}, "9 experts a token, but only 4 a layer"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"head_dim": None, "hidden_size": 60}, "head_dim 15 is odd"),
    ({"head_dim": None, "num_attention_heads": 0}, "num_attention_heads must be"),
    ({"head_dim": None, "hidden_size": "64"}, "hidden_size: expected int, got str"),
    ({"head_dim": None, "num_attention_heads": "4"}, "num_attention_heads: expected int, got str"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_a_bad_config_is_named_by_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Geometry.from_config(TINY_CONFIG | changes, "/models/x/config.json")
    assert str(caught.value).startswith("/models/x/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_local_experts", "vocab_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in TINY_CONFIG.items() if name != key}
    with pytest.raises(CheckpointError, match=f"^here: object missing required field {key}"):
        Geometry.from_config(config, "here")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({key: value for key, value in PARAMS_8X22B.items() if key != "moe"}, "object missing required field moe"),
        ({key: value for key, value in PARAMS_8X22B.items() if key != "dim"}, "object missing required field dim"),
        (PARAMS_8X22B | {"moe": {"num_experts": 8}}, "moe: object missing required field num_experts_per_tok"),
        (PARAMS_8X22B | {"moe": None}, "moe: expected object, got null"),
    ],
)
def test_bad_params_of_the_mistral_release_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: {message}"):
        config_from_params(params, "here")
