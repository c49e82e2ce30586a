"""The content of a store: bit for bit bitsandbytes' codes and scales, read back with the safetensors library."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint, write_mistral
from safetensors.torch import load_file
from stores import files_of, make_store

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.errors import CheckpointError
from qmix.precision.bitsandbytes import functional as bnb
from qmix.progress import Progress
from qmix.store import weight_run
from qmix.store.opened import Store, open_store
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for

# hidden and intermediate size: packed; w2 alone not packed; short last blocks; an odd number of weights
SIZES = [(64, 128), (64, 96), (36, 50), (33, 35)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def expected_parts(matrix: torch.Tensor, precision: str, half: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what bitsandbytes makes of a matrix, absmax rounded to bf16."""
    rows, cols = matrix.shape
    if precision == "half":
        return {"weight": matrix.to(half)}
    if precision == "int8":
        codes, row_max, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(matrix)
        return {"codes": codes, "row_max": row_max}
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type=precision)
    if rows % 32 or cols % 64:
        return {"codes": codes.reshape(-1), "absmax": state.absmax.bfloat16()}
    packed, state = bnb._convert_weight_packed_for_cpu(codes, state)
    return {"codes": packed.reshape(rows, cols // 2), "absmax": state.absmax.bfloat16()}


def check_experts(store: Store, weights: dict[str, torch.Tensor]) -> None:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[store.layout.dtype]
    for layer, row in enumerate(store.layout.precisions):
        found = load_file(store.directory / f"experts-{layer:05d}.safetensors")
        names = {name for name in found if not name.startswith("__pad__.")}
        for (expert, precision), matrix in product(enumerate(row), ("w1", "w2", "w3")):
            weight = weights[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"]
            for part, want in expected_parts(weight, precision, half).items():
                name = f"experts.{expert}.{matrix}.{part}"
                assert found[name].dtype == want.dtype
                assert torch.equal(found[name], want), name
                names.remove(name)
        assert not names


def odd_config(hidden: int, inner: int) -> dict:
    return TINY_CONFIG | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1}


def without_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if ".experts." not in name}


def stored_dense(store: Path) -> dict[str, torch.Tensor]:
    found = load_file(store / "dense.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.startswith("__pad__.")}


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_are_what_bitsandbytes_makes_of_them(
    tmp_path: Path, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    config = odd_config(hidden, inner)
    weights = random_weights(config, dtype=dtype)
    half = "fp16" if dtype is torch.float16 else "bf16"
    checkpoint = write_checkpoint(tmp_path / "m", weights, config)
    store = make_store(checkpoint, tmp_path / "s", "nf4,*.1=fp4,*.2=int8,*.3=half", half)
    check_experts(store, weights)


def test_hard_blocks_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    """All zero, one single weight, denormal, huge, all equal, and every midpoint of neighbouring codes."""
    weights = random_weights(TINY_CONFIG, dtype=torch.float32)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    hard = weights[name]
    hard[0], hard[1], hard[2], hard[3], hard[4] = 0, 0, 1e-40, 3e37, -0.25
    hard[1, 63] = 7
    for row, kind in ((5, "nf4"), (6, "fp4")):
        table = bnb.get_4bit_type(kind, device="cpu").sort().values
        hard[row, :16] = table
        hard[row, 16:31] = (table[1:] + table[:-1]) / 2
    hard[7, ::2], hard[7, 1::2] = -0.0, 1.0
    checkpoint = write_checkpoint(tmp_path / "m", weights, TINY_CONFIG)
    for precision in ("nf4", "fp4", "int8"):
        store = make_store(checkpoint, tmp_path / precision, f"half,0.1={precision}")
        check_experts(store, weights)


def test_every_expert_has_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    weights = random_weights(TINY_CONFIG)
    checkpoint = write_checkpoint(tmp_path / "m", weights, TINY_CONFIG)
    store = make_store(checkpoint, tmp_path / "s", "nf4,0.*=int8,*.3=half,1.1=fp4")
    table = [["int8", "int8", "int8", "half"], ["nf4", "fp4", "nf4", "half"]]
    assert [list(row) for row in store.layout.precisions] == table
    check_experts(store, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", [None, "bf16", "fp16"])
def test_dense_weights_are_the_checkpoints_own_in_the_half_that_is_asked_for(
    tmp_path: Path, dtype: torch.dtype, asked: str | None
) -> None:
    weights = random_weights(TINY_CONFIG, dtype=dtype)
    store = make_store(write_checkpoint(tmp_path / "m", weights, TINY_CONFIG), tmp_path / "s", "half", asked)
    half = asked or ("fp16" if dtype is torch.float16 else "bf16")
    assert store.layout.dtype == half
    want = torch.bfloat16 if half == "bf16" else torch.float16
    found = stored_dense(tmp_path / "s")
    assert found.keys() == without_experts(weights).keys()
    for name, tensor in found.items():
        assert tensor.dtype == want
        assert torch.equal(tensor, weights[name].to(want)), name


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
@pytest.mark.parametrize("chunk", [1, 700, 2500])
def test_the_size_of_chunks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, inner: int, chunk: int
) -> None:
    config = odd_config(hidden, inner)
    checkpoint = write_mistral(tmp_path / "m", random_weights(config), config)
    spec = "nf4,*.1=int8,*.2=half"
    make_store(checkpoint, tmp_path / "whole", spec)
    monkeypatch.setattr(weight_run, "CHUNK_WEIGHTS", chunk)
    reads = []
    rows = weight_run.WeightFile.rows
    monkeypatch.setattr(weight_run.WeightFile, "rows", lambda *args: reads.append(args) or rows(*args))
    make_store(checkpoint, tmp_path / "chunked", spec)
    assert files_of(tmp_path / "chunked") == files_of(tmp_path / "whole")
    assert len(reads) > 22  # as many weights as there are


def test_the_store_brings_the_models_own_small_files(tmp_path: Path, tiny: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", random_weights(TINY_CONFIG), TINY_CONFIG, tokenizer=tiny)
    (checkpoint / "generation_config.json").write_text('{"do_sample": false}')
    store = make_store(checkpoint, tmp_path / "s")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (store.directory / name).read_bytes() == (checkpoint / name).read_bytes()
    assert store.config == TINY_CONFIG
    weights = {"dense.safetensors", "experts-00000.safetensors", "experts-00001.safetensors"}
    copied = {path.name for path in checkpoint.iterdir()} - {"model.safetensors"}
    assert files_of(store.directory).keys() == weights | copied | {"qmix.json", "source.json"}
    assert store.source_name == "m"


def test_progress_counts_the_checkpoints_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(LocalSource(make_checkpoint(tmp_path / "m", shards=3)))
    seen: list[Progress] = []
    quantize(checkpoint, tmp_path / "s", layout_for(checkpoint, None, None), seen.append)
    nbytes = sum(weight.nbytes for weight in random_weights(TINY_CONFIG).values())
    assert {progress.total for progress in seen} == {nbytes}
    assert seen[-1].done == nbytes
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)


NAN, INF = float("nan"), float("inf")
EXPERT = "layers.1.block_sparse_moe.experts.3.w2"


@pytest.mark.parametrize(
    ("precision", "name", "bad"),
    [
        *((precision, EXPERT, bad) for precision in ("nf4", "fp4", "int8", "half") for bad in (NAN, INF)),
        ("nf4", "layers.0.self_attn.k_proj", -INF),
        ("nf4", "norm", NAN),
    ],
)
def test_a_weight_that_is_no_number_is_named_with_its_file(
    tmp_path: Path, precision: str, name: str, bad: float
) -> None:
    weights = random_weights(TINY_CONFIG)
    weights[f"model.{name}.weight"].view(-1)[-1] = bad
    checkpoint = write_checkpoint(tmp_path / "m", weights, TINY_CONFIG, shards=2)
    with pytest.raises(CheckpointError) as caught:
        make_store(checkpoint, tmp_path / "s", precision)
    file = next(path for path in checkpoint.glob("*.safetensors") if f"model.{name}.weight" in load_file(path))
    assert str(caught.value) == (
        f"{file}: tensor 'model.{name}.weight' holds NaN or infinite weights; the checkpoint is damaged, fetch it again"
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("odd", [False, True])
def test_a_bad_weight_in_any_place_of_a_matrix_is_found(tmp_path: Path, odd: bool) -> None:
    config = odd_config(33, 35) if odd else TINY_CONFIG
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    count = random_weights(config)[name].numel()
    for index, place in enumerate((0, 1, 63, 64, count // 2, count - 64, count - 1)):
        weights = random_weights(config)
        weights[name].view(-1)[place] = float("nan")
        with pytest.raises(CheckpointError, match="NaN"):
            make_store(write_checkpoint(tmp_path / f"m{index}", weights, config), tmp_path / f"s{index}")


def test_weights_too_large_for_fp16_say_what_to_do(tmp_path: Path) -> None:
    weights = random_weights(TINY_CONFIG)
    weights["model.norm.weight"][5] = 70000
    checkpoint = write_checkpoint(tmp_path / "m", weights, TINY_CONFIG)
    with pytest.raises(CheckpointError) as caught:
        make_store(checkpoint, tmp_path / "s", dtype="fp16")
    assert str(caught.value) == (
        f"{checkpoint}/model.safetensors: tensor 'model.norm.weight' has values too large for fp16; use dtype='bf16'"
    )
    assert not (tmp_path / "s").exists()
    make_store(checkpoint, tmp_path / "bf16", dtype="bf16")
    assert open_store(tmp_path / "bf16").layout.dtype == "bf16"


@pytest.mark.parametrize("precision", ["nf4", "half"])
def test_weights_too_large_for_bf16_are_no_weights(tmp_path: Path, precision: str) -> None:
    """fp32 beyond the largest bf16 would become infinite, as a weight or as the scale of its block."""
    weights = random_weights(TINY_CONFIG, dtype=torch.float32)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    weights[name][3, 5] = torch.finfo(torch.float32).max
    checkpoint = write_checkpoint(tmp_path / "m", weights, TINY_CONFIG)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has values too large for bf16; no half"):
        make_store(checkpoint, tmp_path / "s", precision)
