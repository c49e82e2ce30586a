"""Every fault of a checkpoint is said in one line that names its file or tensor."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint, write_fused
from safetensors.torch import load_file, save_file

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.source import LocalSource
from qmix.errors import CheckpointError

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"
EXPERT3 = "model.layers.0.block_sparse_moe.experts.3"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(LocalSource(directory))
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# what is put in place of weights (None: nothing), by tensor; and what the refusal says
WRONG_TENSORS = {
    "missing": ({W1: None}, f"tensor '{W1}' is missing; is a shard missing?"),
    "missing expert": (
        {EXPERT3 + ".w1.weight": None, EXPERT3 + ".w2.weight": None, EXPERT3 + ".w3.weight": None},
        f"tensor '{EXPERT3}.w1.weight' is missing, and 2 more",
    ),
    "unknown": ({"model.extra": torch.ones(3)}, "tensor 'model.extra' does not belong to the model"),
    "nearly known": ({"layers.0": torch.ones(3)}, "tensor 'layers.0' does not belong to the model"),
    "one layer too many": (
        {W1.replace("layers.1", "layers.2"): torch.ones(128, 64)},
        "experts.2.w1.weight' does not belong to the model that its config describes",
    ),
    "transposed": (
        {W1: torch.ones(64, 128)},
        f"tensor '{W1}' has shape [64, 128], its config asks for [128, 64]",
    ),
    "a row short": (
        {Q0: torch.ones(63, 64)},
        f"tensor '{Q0}' has shape [63, 64], its config asks for [64, 64]",
    ),
    "a dimension more": (
        {"model.norm.weight": torch.ones(1, 64)},
        "tensor 'model.norm.weight' has shape [1, 64], its config asks for [64]",
    ),
    "int8": (
        {W1: torch.ones(128, 64, dtype=torch.int8)},
        f"tensor '{W1}' is of type I8; qmix reads BF16, F16, F32",
    ),
    "double": ({W1: torch.ones(128, 64, dtype=torch.float64)}, f"tensor '{W1}' is of type F64"),
    "fp8": (
        {W1: torch.ones(128, 64).to(torch.float8_e4m3fn)},
        f"tensor '{W1}' is of type F8_E4M3",
    ),
    "in both formats": (
        {"norm.weight": torch.ones(64)},
        "tensors 'model.norm.weight' and 'norm.weight' are the same weight",
    ),
}


@pytest.mark.parametrize("fault", WRONG_TENSORS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrong_tensor_is_named(tmp_path: Path, fault: str, shards: int) -> None:
    instead, message = WRONG_TENSORS[fault]
    weights = {name: weight for name, weight in (random_weights(TINY_CONFIG) | instead).items() if weight is not None}
    assert message in refusal(write_checkpoint(tmp_path / "m", weights, TINY_CONFIG, shards))


@pytest.mark.parametrize("rows", [255, 257, 258])
def test_fused_experts_of_a_wrong_shape_are_named(tmp_path: Path, rows: int) -> None:
    directory = write_fused(tmp_path / "fused", random_weights(TINY_CONFIG), TINY_CONFIG)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights[name] = torch.ones(4, rows, 64, dtype=torch.bfloat16)
    save_file(weights, directory / "model.safetensors")
    assert f"tensor '{name}' has shape [4, {rows}, 64], its config asks for [4, 256, 64]" in refusal(directory)


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=2)
    second = load_file(directory / "model-00002-of-00002.safetensors")
    second[Q0] = torch.ones(64, 64)
    save_file(second, directory / "model-00002-of-00002.safetensors")
    shards = "model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"
    assert f"tensor '{Q0}' is both in {shards}" in refusal(directory)


def test_a_missing_shard_is_named_by_the_index(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    want = "the shard model-00002-of-00003.safetensors named by model.safetensors.index.json is missing; fetch it"
    assert want in refusal(directory)


def test_a_missing_shard_without_an_index_is_seen_by_its_tensors(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=3)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model-00003-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert re.search(r"tensor 'model\.\S+' is missing, and \d+ more; is a shard missing\?", message)


@pytest.mark.parametrize("damage", ["cut", "grown", "header"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=3)
    shard = directory / "model-00002-of-00003.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes({"cut": raw[:-1], "grown": raw + b"!", "header": raw[:8] + b"[" + raw[9:]}[damage])
    message = refusal(directory)
    assert str(shard) in message
    assert "fetch it again" in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "has no usable weight_map"),
        ('{"weight_map": {"a": [1]}}', "has no usable weight_map"),
        ('{"weight_map": {"a": "../m/config.json"}}', "the shard ../m/config.json named by"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=2)
    (directory / "model.safetensors.index.json").write_text(index)
    told = refusal(directory)
    assert "model.safetensors.index.json" in told
    assert message in told


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'; qmix runs Mixtral models only"),
        (
            {"num_hidden_layers": "2"},
            "config.json: num_hidden_layers must be a whole number above zero, not '2'",
        ),
        (
            {"num_hidden_layers": 1},
            "tensor 'model.layers.1.block_sparse_moe.experts.0.w1.weight' does not belong",
        ),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing, and 18 more"),
        ({"num_local_experts": 5}, "gate.weight' has shape [4, 64], its config asks for [5, 64]"),
        ({"tie_word_embeddings": None, "vocab_size": 97}, "has shape [96, 64], its config asks for [97, 64]"),
    ],
)
def test_a_config_of_something_else_is_named(tmp_path: Path, config: dict, message: str) -> None:
    weights = random_weights(TINY_CONFIG)
    assert message in refusal(write_checkpoint(tmp_path / "m", weights, TINY_CONFIG | config))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither config.json nor params.json is there"),
        ({"config.json": "not json"}, "config.json: not valid JSON"),
        ({"config.json": "[]"}, "config.json: not a JSON object"),
        ({"params.json": '{"dim": 64}'}, "params.json: the key 'moe' is missing"),
        ({"config.json": json.dumps(TINY_CONFIG), "other.safetensors": ""}, "no weights found"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_what_it_lacks(tmp_path: Path, files: dict, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert message in refusal(tmp_path)


class Malicious:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "mark"
    weights = random_weights(TINY_CONFIG) | {"evil": Malicious(mark)}
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    if zipped:
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": Malicious(mark)}, protocol=2))
    message = refusal(directory)
    assert "pytorch_model.bin: damaged, or a pickle with code in it, which is never run" in message
    assert "safetensors" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # the very pickle does run where nobody looks
    assert mark.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "list", "numbers", "unnamed"])
def test_a_pickle_of_no_tensors_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    objects = {"list": [torch.ones(2)], "numbers": {"a": 1}, "unnamed": {1: torch.ones(2)}}
    torch.save(objects.get(damage, random_weights(TINY_CONFIG)), path)
    contents = {"cut": path.read_bytes()[:-4000], "empty": b"", "garbage": b"garbage"}
    path.write_bytes(contents.get(damage, path.read_bytes()))
    message = "holds something else than named tensors" if damage in objects else "damaged, or a pickle with code"
    assert f"{path}: {message}" in refusal(tmp_path)


def test_a_local_copy_that_loses_bytes_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Headers are checked when it is opened; the file may be cut afterwards."""
    directory = make_checkpoint(tmp_path / "m")
    checkpoint = open_checkpoint(LocalSource(directory))
    weight = max(checkpoint.weights.values(), key=lambda weight: weight.offset)
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(weight.offset + 10)
    with WeightFile(directory / "model.safetensors") as source, pytest.raises(CheckpointError) as caught:
        source.rows(weight, 0, weight.rows)
    tensor = weight.piece.tensor
    assert str(caught.value) == f"{directory}/model.safetensors: cut short inside '{tensor}'; fetch it again"


def test_a_fetched_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("gone.safetensors", "gone.bin"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/{name}: No such file or directory"):
            WeightFile(tmp_path / name)
