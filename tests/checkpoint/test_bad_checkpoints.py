"""Every fault of a checkpoint is said in one line that names its file or tensor."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint, write_fused, write_mistral
from command import LIMIT_SECONDS
from safetensors.torch import load_file, save_file

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.source import LocalSource
from qmix.errors import CheckpointError, UsageError
from qmix.geometry import CONFIG_KEYS, config_from_params
from qmix.store.sources import open_source

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
        ("{", "invalid JSON: Input data was truncated"),
        ("[]", "expected object, got array"),
        ("{}", "object missing required field weight_map"),
        ('{"weight_map": {}}', "weight_map: expected object of length >= 1"),
        ('{"weight_map": {"a": [1]}}', "weight_map[...]: expected str, got array"),
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
            "config.json: num_hidden_layers: expected int, got str",
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
        ({}, "has no config.json or params.json"),
        ({"config.json": "not json"}, "config.json: invalid JSON"),
        ({"config.json": "[]"}, "config.json: expected object, got array"),
        ({"params.json": '{"dim": 64}'}, "params.json: object missing required field n_layers; is it of a Mixtral?"),
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
    assert "pytorch_model.bin: damaged, or a pickle with code, which qmix never runs" in message
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
    message = "does not hold named tensors" if damage in objects else "damaged, or a pickle with code"
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
    told = f"cut short inside '{tensor}', ends at byte {weight.offset + 10}; fetch it again"
    assert str(caught.value) == f"{directory}/model.safetensors: {told}"


def test_a_fetched_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("gone.safetensors", "gone.bin"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/{name}: No such file or directory"):
            WeightFile(tmp_path / name)


def expert_names() -> list[str]:
    return [name for name in random_weights(TINY_CONFIG) if ".experts." in name]


def in_place_of_experts(*tensors: tuple[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, and where an expert's was the given tensors, their names put in its last word's place."""
    rest = {name: weight for name, weight in random_weights(TINY_CONFIG).items() if ".experts." not in name}
    for name in expert_names():
        rest |= {name.removesuffix("weight") + last: value.clone() for last, value in tensors}
    return rest


def quantised(method: str, **more: object) -> dict:
    return TINY_CONFIG | {"quantization_config": {"quant_method": method, **more}}


I32, U8 = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 1, dtype=torch.uint8)
GPTQ = (("qweight", I32), ("qzeros", I32), ("scales", torch.ones(4)), ("g_idx", I32[0]))
BNB4 = (("weight", U8), ("weight.absmax", U8[:, 0]), ("weight.quant_state.bitsandbytes__nf4", U8[:, 0]))
FP8 = (("weight", torch.zeros(128, 64).to(torch.float8_e4m3fn)), ("weight_scale_inv", torch.ones(1)))
FOREIGN = {
    "gptq": (in_place_of_experts(*GPTQ), quantised("gptq", bits=4), "quant_method 'gptq'"),
    "awq": (in_place_of_experts(*GPTQ[:3]), quantised("awq"), "quant_method 'awq'"),
    "bnb4": (in_place_of_experts(*BNB4), quantised("bitsandbytes"), "quant_method 'bitsandbytes'"),
    "bnb8": (
        in_place_of_experts(("weight", torch.zeros(128, 64, dtype=torch.int8)), ("SCB", torch.ones(128))),
        quantised("bitsandbytes", load_in_8bit=True),
        "quant_method 'bitsandbytes'",
    ),
    "fp8": (in_place_of_experts(*FP8), quantised("fp8"), "quant_method 'fp8'"),
    "compressed": (
        in_place_of_experts(("weight_packed", I32), ("weight_scale", torch.ones(1))),
        quantised("compressed-tensors"),
        "quant_method 'compressed-tensors'",
    ),
    "unsaid": (in_place_of_experts(*GPTQ), TINY_CONFIG, "tensor 'model.layers.0.block_sparse_moe.experts.0.w1."),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_quantised_checkpoint_is_called_that(tmp_path: Path, kind: str) -> None:
    weights, config, how = FOREIGN[kind]
    told = refusal(write_checkpoint(tmp_path / "m", weights, config))
    assert f"m: is already quantised ({how}" in told
    assert told.endswith("; give the half-precision checkpoint that it was made from")


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_called_that_even_beside_weights(tmp_path: Path, whole: bool) -> None:
    """transformers would add it to the weights: leaving it out would be another model."""
    directory = make_checkpoint(tmp_path / "m") if whole else tmp_path
    save_file(
        {"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(2)}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert "is an adapter (adapter_config.json) of org/base; merge it into that model" in refusal(directory)


def test_a_directory_of_a_gguf_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "mix.Q4_0.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "holds a GGUF (mix.Q4_0.gguf), quantised for llama.cpp" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"), [("a.gguf", "a GGUF file"), ("b", "a GGUF file"), ("c.safetensors", "a file")]
)
def test_a_file_in_place_of_a_directory_is_called_that(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" if name == "b" else b"")
    with pytest.raises(UsageError, match=rf"{name}: is {what}[,;] "):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "pytorch_model.bin"]
)
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path / "m", shards=2)
    if name.endswith(".bin"):
        for path in directory.glob("*.safetensors*"):
            path.unlink()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4983004072\n"
    (directory / name).write_text(pointer)
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(LocalSource(directory)).tokenizer_files())
    assert f"{directory / name}: a git-lfs pointer" in str(caught.value)
    assert f"run `git lfs pull` in {directory}" in str(caught.value)


HUGE = 2**31
IN_LITTLE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.errors import CheckpointError, UsageError
from qmix.geometry import CONFIG_KEYS, config_from_params
from qmix.engine.resolve import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for directory in sys.argv[1:]:
    try:
        open_checkpoint(LocalSource(__import__("pathlib").Path(directory)))
    except CheckpointError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10, "64 MiB"
"""


def test_sizes_that_no_checkpoint_has_cost_nothing(tmp_path: Path) -> None:
    """Each is compared with the tensors that are there before anything is built from it."""
    keys = [key for key in CONFIG_KEYS.values() if key not in ("num_experts_per_tok", "max_position_embeddings")]
    keys.remove("num_key_value_heads")
    weights, directories = random_weights(TINY_CONFIG), []
    for key in keys:
        for form in (write_checkpoint, write_fused, write_mistral):
            together = {"num_key_value_heads": HUGE} if key == "num_attention_heads" else {}
            directory = form(tmp_path / f"{key}-{form.__name__}", weights, TINY_CONFIG)
            file = directory / ("params.json" if form is write_mistral else "config.json")
            config = config_from_params(json.loads(file.read_text())) if form is write_mistral else TINY_CONFIG
            file.unlink()
            (directory / "config.json").write_text(json.dumps(config | {key: HUGE} | together))
            directories.append(directory)
    command = [sys.executable, "-c", IN_LITTLE, *directories]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert len(lines) == len(directories)
    for directory, line in zip(directories, lines, strict=True):
        assert line.startswith(f"{directory}: tensor "), line
        assert re.search(r"is missing, and \d+ more|has shape .* its config asks for", line), line


DIGITS, NESTED = "1" + "0" * 5000, "[" * 100_000 + "]" * 100_000
SPOILT = {
    "beyond float": ('{"router_aux_loss_coef": 1e400}', "router_aux_loss_coef: number out of range"),
    "digits": ('{"router_aux_loss_coef": ' + DIGITS + "}", "router_aux_loss_coef: integer value out of range"),
    "size of digits": ('{"hidden_size": ' + DIGITS + "}", "hidden_size: integer value out of range"),
    "nested": ('{"x": ' + NESTED + "}", "invalid JSON: nested too deeply"),
    "surrogate": ('{"x": "\\ud800"}', "invalid JSON: "),
    "nan": ('{"rms_norm_eps": NaN}', "invalid JSON: "),
    "list": ("[1]", "expected object, got array"),
    "bytes": (b'{"x": "\xff"}', "invalid JSON: not UTF-8 (byte 8)"),
    "empty": ("", "invalid JSON: "),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("file", ["config.json", "params.json", "model.safetensors.index.json", "adapter_config.json"])
def test_json_of_a_checkpoint_is_read_or_named(tmp_path: Path, file: str, spoilt: str) -> None:
    content, message = SPOILT[spoilt]
    form = write_mistral if file == "params.json" else write_checkpoint
    directory = form(tmp_path / "m", random_weights(TINY_CONFIG), TINY_CONFIG, 2)
    (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    told = refusal(directory)
    assert told.startswith(f"{directory / file}: ") or file == "adapter_config.json"
    if file in ("config.json", "params.json"):
        assert message in told


@pytest.mark.parametrize("spoilt", SPOILT)
def test_json_in_a_header_is_read_or_named(tmp_path: Path, spoilt: str) -> None:
    content, _ = SPOILT[spoilt]
    directory = make_checkpoint(tmp_path / "m")
    raw = content if isinstance(content, bytes) else content.encode()
    raw = raw.ljust(16)
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert refusal(directory).startswith(f"{directory}/model.safetensors: its header is damaged")


def test_a_pickled_tensor_that_only_claims_its_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    torch.save({W1: torch.zeros(1, 64).expand(HUGE, 64)}, tmp_path / "pytorch_model.bin")
    assert f"tensor {W1!r} in pytorch_model.bin is smaller than its shape" in refusal(tmp_path)
