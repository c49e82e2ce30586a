"""Headers against the real safetensors library, and against every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmix.checkpoint.safetensors_header import ITEM_BYTES, TensorInfo, build_header, check_header, read_header
from qmix.errors import CheckpointError

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}

anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_lists = st.lists(st.tuples(st.sampled_from(sorted(TORCH)), shapes, st.integers(0, 70)), max_size=6)


def write(path: Path, header: Any, payload: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    return path


def tensors_or_refusal(read: Callable[[], dict[str, TensorInfo]], named: str) -> dict[str, TensorInfo] | None:
    """Return what `read` gives; None where it refuses, in words that name the file."""
    try:
        return read()
    except CheckpointError as refusal:
        message = str(refusal)
    assert named in message
    return None


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """[2, 3] of F32 and 5 bytes, written by the library."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    return tmp_path / "good.safetensors"


def test_a_written_file_opens_in_the_library_with_its_padding(tmp_path: Path) -> None:
    header, tensors = build_header([("a", "F32", (2, 2), 64), ("b", "I8", (3,), 80)], 4096, 4096)
    assert len(header) == 4096
    assert {name: info.offset for name, info in tensors.items()} == {"a": 4096 + 64, "b": 4096 + 80}
    payload = bytearray(4096)
    payload[64:80] = torch.tensor([1.0, 2.0, 3.0, 4.0]).numpy().tobytes()
    payload[80:83] = bytes([5, 6, 255])
    (tmp_path / "x.safetensors").write_bytes(header + payload)
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        "__pad__.0": (64,),
        "a": (2, 2),
        "b": (3,),
        "__pad__.1": (4096 - 83,),
    }
    assert loaded["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert loaded["b"].tolist() == [5, 6, -1]


@anywhere
@given(tensor_lists, st.sampled_from([8, 64, 4096]), st.integers(0, 100))
def test_any_layout_reads_back_through_the_library(tmp_path: Path, wanted: list, alignment: int, tail: int) -> None:
    placed, position = [], 0
    for index, (dtype, shape, gap) in enumerate(wanted):
        placed.append((f"t{index}", dtype, shape, position + gap))
        position += gap + prod(shape) * ITEM_BYTES[dtype]
    header, tensors = build_header(placed, position + tail, alignment)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(index % 251 for index in range(position + tail)))
    assert len(header) % alignment == 0
    raw = path.read_bytes()
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if not name.startswith("__pad__.")]  # noqa: SIM118 -- no mapping
        assert sorted(names) == sorted(tensors)
        for name, info in tensors.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (TORCH[info.dtype], info.shape)
            there = raw[info.offset : info.offset + info.nbytes]
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == there
    assert {name: info for name, info in read_header(path).items() if name in tensors} == tensors


@anywhere
@given(tensor_lists)
def test_any_file_of_the_library_is_read_where_its_bytes_lie(tmp_path: Path, wanted: list) -> None:
    tensors = {
        f"t{index}": torch.full(shape, index + 1).to(TORCH[dtype]) for index, (dtype, shape, _) in enumerate(wanted)
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    found, raw = read_header(path), path.read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (TORCH[info.dtype], info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert raw[info.offset : info.offset + info.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_cut_is_found(good: Path) -> None:
    raw = good.read_bytes()
    for length in range(len(raw)):
        good.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cut short.*fetch it again") as caught:
            read_header(good)
        assert str(good) in str(caught.value)


def test_a_file_that_is_too_long_is_found(good: Path) -> None:
    good.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"good.safetensors: too long: \d+ bytes, its header says"):
        read_header(good)


def test_no_flipped_bit_of_a_header_gives_more_than_the_library_takes(good: Path) -> None:
    raw = good.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for bit in range(8 * start):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        good.write_bytes(flipped)
        found = tensors_or_refusal(lambda: read_header(good), str(good))
        if found is None:
            continue
        places = sorted((info.offset, info.nbytes) for info in found.values())
        assert places == [(start, 24), (start + 24, 5)]
        with safe_open(good, "pt") as file:
            assert set(file.keys()) == set(found), f"bit {bit}: {bytes(flipped[8:start])!r}"


DAMAGED = [
    (b"", "cut short"),
    (b"{", "cut short"),
    (b"{]", "its header is damaged"),
    (b"\xff\xfe{}", "its header is damaged"),
    (b"[" * 100_000, "its header is damaged"),
    ([], "its header is damaged"),
    ({"a": A, "b": B | {"data_offsets": [23, 28]}}, "a hole or an overlap before tensor 'b'"),
    ({"a": A, "b": B | {"data_offsets": [25, 30]}}, "a hole or an overlap before tensor 'b'"),
    ({"b": B}, "a hole or an overlap before tensor 'b'"),
    ({"a": A, "b": B | {"shape": [6]}}, "tensor 'b' does not have the size of its shape"),
    ({"a": A, "b": B | {"dtype": "F16"}}, "tensor 'b' does not have the size of its shape"),
    ({"a": A, "b": B | {"shape": [-1, -5]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"shape": [5.0]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"shape": "5"}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"shape": None}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"data_offsets": ["24", "29"]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"data_offsets": [29, 24]}}, "does not have the size of its shape"),
    ({"a": A, "b": B | {"data_offsets": [24]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"data_offsets": [24, None]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"dtype": "F12"}}, "damaged at tensor 'b'"),
    ({"a": A, "b": B | {"dtype": ["U8"]}}, "damaged at tensor 'b'"),
    ({"a": A, "b": 5}, "damaged at tensor 'b'"),
    ({"a": A, "b": {}}, "damaged at tensor 'b'"),
    ({"a": A, "b": A | {"data_offsets": [-24, 0]}}, "damaged at tensor 'b'"),
]


@pytest.mark.parametrize(("header", "message"), DAMAGED)
def test_damage_is_said_of_the_file_and_the_tensor(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(29))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("fetch it again")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*sorted(ITEM_BYTES), "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 6), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3) | json_values, st.integers(0, 40))
def test_no_header_whatever_gets_past_the_check_unless_it_fills_the_file(header: Any, size: int) -> None:
    tensors = tensors_or_refusal(lambda: check_header(header, 8, 8 + size, "x"), "x: ")
    if tensors is None:
        return
    position = 8
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        assert info.offset == position
        position += info.nbytes
    assert position == 8 + size


def test_an_empty_tensor_may_share_its_place_in_any_order(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}
    path = write(tmp_path / "x.safetensors", {"b": A, "empty": empty}, bytes(24))
    assert load_file(path)["empty"].shape == (0, 7)
    assert read_header(path)["empty"].nbytes == 0


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_header(tmp_path / name)


def test_overlapping_tensors_are_not_written() -> None:
    with pytest.raises(AssertionError, match="b overlaps"):
        build_header([("a", "F32", (2,), 0), ("b", "U8", (1,), 7)], 64, 8)
