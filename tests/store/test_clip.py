"""Scales of 4-bit blocks chosen by their squared error: which ones, and what stores and commands make of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stores import files_of, interrupt_store, make_store, refusal

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.source import LocalSource
from qmix.engine.resolve import prepare_store
from qmix.errors import CheckpointError, StoreError, UsageError
from qmix.kernels.cpu.blocks import CLIP, TINY, VALUES, midpoints_of
from qmix.kernels.cpu.quantize import quantize_4bit_flat, quantize_4bit_packed
from qmix.kernels.packing import BLOCK
from qmix.model.kv_file import kv_identity
from qmix.precision.bitsandbytes import functional as bnb
from qmix.precision.round_trip import round_trip
from qmix.store.manifest import sealed
from qmix.store.opened import open_store
from qmix.store.sources import layout_for

KINDS = ("nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float32)

both_kinds = pytest.mark.parametrize("kind", KINDS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def spread(*shape: int, seed: int, exponents: float) -> torch.Tensor:
    """Magnitudes over `exponents` powers of two, a few zeros among them."""
    weights = normal(*shape, seed=seed) * normal(*shape, seed=seed + 1, scale=exponents).exp2()
    weights.view(-1)[::7] = 0
    return weights


def bits(weights: torch.Tensor) -> np.ndarray:
    """Return weights as the kernels take them."""
    return weights.view(torch.uint16).numpy() if weights.dtype == torch.bfloat16 else weights.numpy()


def flat(weights: torch.Tensor, kind: str, clip: bool = True) -> tuple[np.ndarray, np.ndarray]:
    n = weights.numel()
    codes, scales = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // BLOCK), np.float32)
    assert quantize_4bit_flat(bits(weights).reshape(-1), kind, codes, scales, True, clip)
    return codes, scales


def packed(weights: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = weights.shape
    codes, scales = np.empty(rows * cols // 2, np.uint8), np.empty((cols // BLOCK, rows), np.float32)
    assert quantize_4bit_packed(bits(weights), kind, codes, scales, True)
    return codes, scales


def state_of(absmax: torch.Tensor, shape: tuple[int, ...], kind: str) -> bnb.QuantState:
    table = bnb.get_4bit_type(kind, device="cpu")
    return bnb.QuantState(absmax, shape, code=table, blocksize=BLOCK, quant_type=kind, dtype=torch.float32)


# the choice, in plain numpy


def to_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def blocks_of(weights: torch.Tensor) -> np.ndarray:
    """[blocks, 64] in fp32, zeros behind the last weight."""
    values = weights.float().reshape(-1).numpy()
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def values_of(kind: str) -> np.ndarray:
    values = np.array(VALUES[kind], np.float32)
    return values / values[-1]


def squared_errors(blocks: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """Halves added to halves, as the kernels do it: the sums are theirs to the last bit."""
    inverse = (np.float32(1) / np.maximum(scales, TINY))[:, None]
    ranks = np.searchsorted(np.array(midpoints_of(kind)), blocks * inverse)
    squares = (blocks - values_of(kind)[ranks] * scales[:, None]) ** 2
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    return squares[:, 0]


def expected_scales(weights: torch.Tensor, kind: str) -> np.ndarray:
    blocks = blocks_of(weights)
    absmax = np.abs(blocks).max(1)
    if weights.numel() % BLOCK:
        absmax[-1] = max(absmax[-1], TINY)
    candidates = np.stack([to_bf16(absmax * np.float32(ratio)) for ratio in CLIP])
    errors = np.stack([squared_errors(blocks, scales, kind) for scales in candidates])
    return candidates[errors.argmin(0), np.arange(len(blocks))]  # the first of equals


@both_kinds
@both_dtypes
def test_both_layouts_take_the_scales_of_least_error(kind: str, dtype: torch.dtype) -> None:
    weights = normal(96, 320).to(dtype)
    expected = expected_scales(weights, kind)
    codes, scales = flat(weights, kind)
    np.testing.assert_array_equal(scales, expected)
    assert len(np.unique(np.round(scales / np.abs(blocks_of(weights)).max(1), 2))) > 2
    packed_codes, transposed = packed(weights, kind)
    np.testing.assert_array_equal(transposed, expected.reshape(96, -1).T)
    state = state_of(torch.from_numpy(scales), weights.shape, kind)
    interleaved, _ = bnb._convert_weight_packed_for_cpu(torch.from_numpy(codes)[:, None], state)
    np.testing.assert_array_equal(packed_codes, interleaved.numpy().reshape(-1))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    exponents=st.floats(0, 20),
)
def test_any_weights_take_the_scales_of_least_error(kind, dtype, n, seed, exponents) -> None:
    weights = spread(n, seed=seed, exponents=exponents).to(dtype)
    np.testing.assert_array_equal(flat(weights, kind)[1], expected_scales(weights, kind))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    block=st.sampled_from([32, 64, 128, 4096]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 130)),
    seed=st.integers(0, 2**31),
    exponents=st.floats(0, 4),
)
def test_no_block_is_worse_than_unclipped(kind, dtype, block, shape, seed, exponents) -> None:
    weights = spread(*shape, seed=seed, exponents=exponents).to(dtype)

    def errors(clip: bool) -> torch.Tensor:
        wide = round_trip(weights.float(), kind, block, clip).double() - weights.double()
        return torch.stack([part.square().sum() for part in wide.view(-1).split(block)])

    assert (errors(True) <= errors(False) * (1 + 1e-5)).all()


@both_kinds
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1e-40, 1e-38, -1e-30, 3e30, 3e38])
@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_blocks_of_one_value_are_not_clipped(kind: str, value: float, n: int) -> None:
    """Squares too small or too large for fp32 leave a block as it is, too."""
    weights = torch.full((n,), value).bfloat16()
    codes, scales = flat(weights, kind)
    plain_codes, plain_scales = flat(weights, kind, clip=False)
    np.testing.assert_array_equal(codes, plain_codes)
    np.testing.assert_array_equal(to_bf16(scales), to_bf16(plain_scales))


@both_kinds
@both_dtypes
@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (37, 111)])
def test_what_comes_back_is_what_the_codes_stand_for(kind: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    weights = normal(rows, cols).to(dtype)
    codes, scales = flat(weights, kind)
    state = state_of(torch.from_numpy(scales), (weights.numel(),), kind)
    expected = bnb.dequantize_4bit(torch.from_numpy(codes)[:, None], state).view(rows, cols)
    assert torch.equal(round_trip(weights, kind, clip=True), expected.to(dtype))


@both_kinds
def test_chunks_equal_the_whole(kind: str) -> None:
    weights = normal(96, 320)
    codes, scales = packed(weights, kind)
    parts = [packed(part, kind) for part in weights.split(32)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), codes)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], axis=1), scales)
    whole = round_trip(weights, kind, clip=True)
    assert torch.equal(torch.cat([round_trip(part, kind, clip=True) for part in weights.split(5)]), whole)


@both_dtypes
def test_a_weight_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    weights = normal(32, 64).to(dtype)
    weights[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        round_trip(weights, "nf4", clip=True)
    codes, scales = np.empty(1024, np.uint8), np.empty((1, 32), np.float32)
    assert quantize_4bit_packed(bits(weights), "nf4", codes, scales, True) is False


# stores


CONFIG = TINY_CONFIG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}  # w2 is not packed
SPEC = "nf4,*.1=fp4,*.2=int8"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("clip") / "m", random_weights(CONFIG), CONFIG)


def dequantised(parts: dict[str, torch.Tensor], name: str, kind: str, rows: int, cols: int) -> torch.Tensor:
    """By bitsandbytes alone."""
    codes, absmax = parts[f"{name}.codes"], parts[f"{name}.absmax"]
    if absmax.dim() == 1:
        state = state_of(absmax.float(), (rows * cols,), kind)
        return bnb.dequantize_4bit(codes[:, None], state).view(rows, cols)
    state = state_of(absmax.T.reshape(-1).float(), (rows, cols), kind)
    state.packing_format_for_cpu, state.original_nested = True, False
    state.original_qshape, state.original_dtype = (rows * cols // 2, 1), torch.float32
    codes, state = bnb._convert_weight_packed_for_cpu_inverse(codes, state)
    return bnb.dequantize_4bit(codes, state)


def test_a_store_is_plain_records_of_the_scales_that_were_chosen(checkpoint: Path, tmp_path: Path) -> None:
    store = make_store(checkpoint, tmp_path / "s", SPEC, clip=True)
    plain = make_store(checkpoint, tmp_path / "plain", SPEC)
    assert [file.header for file in store.layout.files] == [file.header for file in plain.layout.files]
    weights = load_file(checkpoint / "model.safetensors")
    parts, unclipped = (load_file(made.directory / "experts-00000.safetensors") for made in (store, plain))
    for expert, kind in enumerate(store.layout.precisions[0]):
        for matrix, (rows, cols) in store.geometry.expert_matrices.items():
            name, weight = f"experts.{expert}.{matrix}", weights[expert_key(0, expert, matrix)]
            if kind == "int8":
                assert torch.equal(parts[f"{name}.codes"], unclipped[f"{name}.codes"])
                continue
            found = dequantised(parts, name, kind, rows, cols)
            assert torch.equal(found.to(weight.dtype), round_trip(weight, kind, clip=True))
            other = dequantised(unclipped, name, kind, rows, cols)
            assert (found - weight).square().sum() < 0.99 * (other - weight).square().sum()


def test_the_manifest_tells_a_clipped_store(checkpoint: Path, tmp_path: Path) -> None:
    plain = make_store(checkpoint, tmp_path / "plain", SPEC)
    clipped = make_store(checkpoint, tmp_path / "clipped", SPEC, clip=True)
    assert (plain.layout.clip, clipped.layout.clip) == (False, True)
    without, told = (json.loads((store.directory / "qmix.json").read_text()) for store in (plain, clipped))
    assert "clip" not in without  # as before there was such a thing
    assert told["clip"] is True
    assert kv_identity(plain) != kv_identity(clipped)
    told["clip"] = "yes"
    (clipped.directory / "qmix.json").write_text(json.dumps(sealed(told)))
    with pytest.raises(StoreError, match="clip: expected bool, got str"):
        open_store(clipped.directory)


def test_neither_is_taken_for_the_other(checkpoint: Path, tmp_path: Path) -> None:
    plain, clipped = tmp_path / "plain", tmp_path / "clipped"
    make_store(checkpoint, plain, SPEC)
    make_store(checkpoint, clipped, SPEC, clip=True)
    made = "is a store of this model made"
    assert refusal(checkpoint, plain, SPEC, None, True) == f"{plain}: {made} without clip; choose another name"
    assert refusal(checkpoint, clipped, SPEC) == f"{clipped}: {made} with clip; choose another name"


def test_an_interrupted_run_goes_on_only_as_it_began(checkpoint: Path, tmp_path: Path) -> None:
    whole = files_of(make_store(checkpoint, tmp_path / "whole", SPEC, clip=True).directory)
    for clip in (False, True):
        store = tmp_path / f"s{clip}"
        interrupt_store(checkpoint, store, SPEC, 5, clip)
        told = refusal(checkpoint, store, SPEC, None, not clip)
        assert told == f"{store}.partial: started with another clip; delete that directory, or choose another name"
        files = files_of(make_store(checkpoint, store, SPEC, clip=clip).directory)
        assert (files == whole) is clip


def test_without_a_4_bit_expert_there_is_nothing_to_clip(checkpoint: Path) -> None:
    opened = open_checkpoint(LocalSource(checkpoint))
    with pytest.raises(UsageError, match=r"clip: int8 has no 4-bit experts \(nf4, fp4\)"):
        layout_for(opened, "int8", None, clip=True)
    assert layout_for(opened, "int8,*.1=fp4", None, clip=True).clip


def test_a_checkpoints_own_store_is_kept_apart(tiny: Path) -> None:
    plain, clipped = prepare_store(tiny), prepare_store(tiny, clip=True)
    assert plain.directory != clipped.directory
    assert (plain.layout.clip, clipped.layout.clip) == (False, True)
    assert prepare_store(tiny, clip=True).directory == clipped.directory
    assert prepare_store(clipped.directory).layout.clip  # a store that is named is taken as it is
    with pytest.raises(UsageError, match=r"clip: the store .* was made without"):
        prepare_store(plain.directory, clip=True)


# commands


def test_the_command_makes_a_store_and_compares_it(qmix, checkpoint: Path, tiny: Path, tmp_path: Path) -> None:
    text, store = tmp_path / "text.txt", tmp_path / "store"
    text.write_text("To install a package, open a terminal and type the command as root. " * 12, "utf-8")
    assert qmix("quantize", tiny, store, "--clip").status == 0
    specs = ("--precision=int8", "--precision=nf4")
    run = qmix("compare", "tiny", store, "--clip", *specs, "--text", text, "--json")
    assert run.status == 0, run.err
    rows = {row.pop("name"): row for row in json.loads(run.out)["rows"]}
    assert list(rows) == ["half", "int8", "nf4", "nf4 --clip", str(store)]
    assert rows["nf4 --clip"] == rows[str(store)]
    assert rows["nf4 --clip"] != rows["nf4"]
    refused = qmix("compare", "tiny", "--clip", "--precision=int8", "--text", text)
    assert refused.status == 2
    assert "--clip: --precision has no 4-bit experts (nf4, fp4)" in refused.err
    assert qmix("quantize", tiny, store).status == 1  # the store is another
    assert qmix("quantize", tiny, tmp_path / "int8", "--clip", "--precision=int8").status == 2
