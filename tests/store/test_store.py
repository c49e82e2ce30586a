"""A store opened again: every part of it checked, and every kind of damage said of its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights
from safetensors.torch import load_file
from stores import make_model, make_pool, make_store

from qmix.errors import REMAKE, StoreError, mending
from qmix.geometry import Geometry
from qmix.model.dense import read_dense
from qmix.store.manifest import sealed
from qmix.store.opened import Store, open_store

SPEC = "nf4,1.*=int8,*.3=half"
LAYER = "experts-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    return make_store(make_checkpoint(directory / "m"), directory / "s", SPEC).directory


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "s")


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    """Change a manifest, and its digest with it: what is tested is the check behind that of the digest."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(sealed(content)))


def read_records(store: Store) -> list[tuple[int, int]]:
    """Every expert of every layer, through a pool that holds fewer than a layer has."""
    pool = make_pool(store, 3)
    try:
        return [
            (layer, expert)
            for layer in range(store.geometry.num_layers)
            for expert, _ in pool.get(layer, range(store.geometry.num_experts))
        ]
    finally:
        pool.close()


def test_an_opened_store_knows_what_it_was_made_of(made: Path) -> None:
    store = open_store(made)
    assert store.config == TINY_CONFIG
    assert store.geometry == Geometry.from_config(TINY_CONFIG)
    assert store.layout.dtype == "bf16"
    assert store.layout.precisions == (("nf4", "nf4", "nf4", "half"), ("int8", "int8", "int8", "half"))
    assert store.source_name == "m"
    assert len(store.fingerprint) == 64
    assert store == make_store(made.parent / "m", made, SPEC)


def test_a_store_gives_back_its_weights(made: Path) -> None:
    store, weights = open_store(made), random_weights(TINY_CONFIG)
    dense = read_dense(store)
    assert dense.keys() == store.geometry.dense_tensors.keys()
    for name, tensor in dense.items():
        assert torch.equal(tensor, weights[name]), name
    assert read_records(store) == [(layer, expert) for layer in range(2) for expert in range(4)]
    pool = make_pool(store, 8)
    for expert, matrices in pool.get(0, [3]):
        for name, matrix in (("w1", matrices.gate), ("w3", matrices.up), ("w2", matrices.down)):
            want = weights[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert torch.equal(matrix.dequantize(0, len(want)), want.float())


def test_every_file_opens_in_the_safetensors_library(made: Path) -> None:
    layout = open_store(made).layout
    for file in layout.files:
        found = load_file(made / file.name)
        assert {name for name in found if not name.startswith("__pad__.")} == file.tensors.keys()
        for name, info in file.tensors.items():
            assert tuple(found[name].shape) == info.shape


FILES = ["qmix.json", "config.json", "dense.safetensors", "experts-00000.safetensors", LAYER]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(store: Path, name: str) -> None:
    (store / name).unlink()
    message = refusal(lambda: open_store(store))
    if name == "qmix.json":
        assert message == f"{store}: not a qmix store (qmix.json is missing)"
    else:
        assert message == f"{store / name}: No such file or directory; {mending(store)}"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_named(store: Path, name: str, left: float) -> None:
    raw = (store / name).read_bytes()
    (store / name).write_bytes(raw[: left if left >= 1 else int(len(raw) * left)])
    message = refusal(lambda: open_store(store))
    assert message.startswith(f"{store / name}: ")
    assert message.endswith(REMAKE if name == "qmix.json" else mending(store))


@pytest.mark.parametrize("name", FILES[2:])
def test_a_file_that_is_too_long_is_named(store: Path, name: str) -> None:
    size = (store / name).stat().st_size
    with (store / name).open("ab") as file:
        file.write(b"\0")
    assert refusal(lambda: open_store(store)) == (
        f"{store / name}: {size + 1} bytes, {size} expected; {mending(store)}"
    )


@pytest.mark.parametrize("name", FILES[2:])
@pytest.mark.parametrize("offset", [0, 7, 8, 30, 4095])
def test_a_flipped_bit_of_a_header_is_found_when_the_store_is_opened(store: Path, name: str, offset: int) -> None:
    flip(store / name, offset)
    want = f"{store / name}: damaged, or belongs to another model; {mending(store)}"
    assert refusal(lambda: open_store(store)) == want


@pytest.mark.parametrize("expert", range(4))
@pytest.mark.parametrize("where", ["first", "middle", "scales", "last"])
def test_a_flipped_bit_of_a_record_is_found_when_it_is_read(store: Path, expert: int, where: str) -> None:
    layout = open_store(store).layout
    start, record = layout.record_offset(1, expert), layout.record(1, expert)
    offset = {
        "first": 0,
        "middle": record.nbytes // 2,
        "scales": record.parts[-1].offset + record.parts[-1].part.nbytes - 1,
        "last": record.nbytes - 1,  # padding counts: it is read as well
    }[where]
    flip(store / LAYER, start + offset)
    damaged = open_store(store)
    place = f"bytes {start} to {start + record.nbytes - 1}"
    want = f"{store / LAYER}: the record of expert {expert} ({place}) is damaged; {mending(store)}"
    assert refusal(lambda: read_records(damaged)) == want
    pool = make_pool(damaged, 3)
    others = [other for other in range(4) if other != expert]
    assert sorted(other for other, _ in pool.get(1, others)) == others
    pool.close()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("last", [False, True])
def test_a_flipped_bit_of_a_dense_weight_is_found_when_it_is_read(store: Path, name: str, last: bool) -> None:
    info = open_store(store).layout.dense.tensors[name]
    flip(store / "dense.safetensors", info.offset + (info.nbytes - 1 if last else 0))
    place = f"bytes {info.offset} to {info.offset + info.nbytes - 1}"
    want = f"{store}/dense.safetensors: the tensor {name} ({place}) is damaged; {mending(store)}"
    assert refusal(lambda: read_dense(open_store(store))) == want
    assert refusal(lambda: make_model(open_store(store))) == want


def test_a_file_that_is_cut_short_after_it_was_opened_is_found_when_it_is_read(store: Path) -> None:
    opened = open_store(store)
    for name, read in ((LAYER, read_records), ("dense.safetensors", read_dense)):
        with (store / name).open("r+b") as file:
            file.truncate(8192)
        assert str(store / name) in refusal(lambda read=read: read(opened))


UNKNOWN = f"unknown precision or dtype; {REMAKE}"
MANIFESTS = {
    "no JSON": (
        lambda path: path.write_text("{"),
        f"invalid JSON: Input data was truncated; {REMAKE}",
    ),
    "no text": (
        lambda path: path.write_bytes(b"\xff\xfe"),
        f"invalid JSON: not UTF-8 (byte 1); {REMAKE}",
    ),
    "no object": (lambda path: path.write_text("[]"), f"expected object, got array; {REMAKE}"),
    "other format": (lambda path: edit(path, lambda m: m.update(format="x")), "format version 2, this qmix"),
    "other version": (
        lambda path: edit(path, lambda m: m.update(format_version=3)),
        f"format version 3, this qmix reads 2; {REMAKE}",
    ),
    "no precisions": (
        lambda path: edit(path, lambda m: m.pop("precisions")),
        "object missing required field precisions",
    ),
    "precisions of another kind": (
        lambda path: edit(path, lambda m: m.update(precisions=4)),
        f"precisions: expected array, got int; {REMAKE}",
    ),
    "precisions of lists": (
        lambda path: edit(path, lambda m: m.update(precisions=[[["nf4"]]])),
        "precisions[0][0]: expected str, got array",
    ),
    "unknown precision": (lambda path: edit(path, lambda m: m["precisions"][0].__setitem__(0, "nf3")), UNKNOWN),
    "unknown dtype": (lambda path: edit(path, lambda m: m.update(dtype="fp8")), UNKNOWN),
    "dtype of another kind": (lambda path: edit(path, lambda m: m.update(dtype=[])), "dtype: expected str, got array"),
    "no checksums": (
        lambda path: edit(path, lambda m: m.update(checksums={})),
        "checksums: object missing required field dense",
    ),
    "no source": (lambda path: edit(path, lambda m: m.update(source=None)), "source: expected object, got null"),
    "a layer too few": (lambda path: edit(path, lambda m: m["precisions"].pop()), "belongs to another model"),
    "an expert too few": (
        lambda path: edit(path, lambda m: m["precisions"][1].pop()),
        "belongs to another model",
    ),
    "a checksum too few": (
        lambda path: edit(path, lambda m: m["checksums"]["records"][0].pop()),
        "belongs to another model",
    ),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_broken_manifest_is_named(store: Path, fault: str) -> None:
    change, message = MANIFESTS[fault]
    change(store / "qmix.json")
    assert refusal(lambda: open_store(store)).startswith(f"{store / 'qmix.json'}: {message}")


def test_other_precisions_in_the_manifest_do_not_fit_the_files(store: Path) -> None:
    edit(store / "qmix.json", lambda manifest: manifest["precisions"][1].__setitem__(0, "nf4"))
    assert refusal(lambda: open_store(store)).startswith(f"{store / LAYER}: damaged, or belongs to another model")


def test_wrong_checksums_are_found_when_their_weights_are_read(store: Path) -> None:
    edit(store / "qmix.json", lambda manifest: manifest["checksums"]["records"][1].__setitem__(2, "0" * 16))
    assert "the record of expert 2 (bytes" in refusal(lambda: read_records(open_store(store)))
    edit(store / "qmix.json", lambda manifest: manifest["checksums"]["dense"].pop("model.norm.weight"))
    assert "the tensor model.norm.weight (bytes" in refusal(lambda: read_dense(open_store(store)))


@pytest.mark.parametrize(
    ("change", "named", "message"),
    [
        ({"model_type": "llama"}, "config.json", "model_type is 'llama'"),
        ({"num_local_experts": 8}, "qmix.json", "belongs to another model than"),
        ({"num_hidden_layers": 3}, "qmix.json", "belongs to another model than"),
        ({"hidden_size": 128}, "dense.safetensors", "damaged, or belongs to another model"),
        ({"intermediate_size": 64}, "experts-00000.safetensors", "damaged, or belongs to another model"),
        ({"tie_word_embeddings": True}, "dense.safetensors", "damaged, or belongs to another model"),
    ],
)
def test_the_config_of_another_model_does_not_open_a_store(
    store: Path, change: dict[str, Any], named: str, message: str
) -> None:
    (store / "config.json").write_text(json.dumps(TINY_CONFIG | change))
    assert refusal(lambda: open_store(store)).startswith(f"{store / named}: {message}")


def test_a_layer_of_another_store_of_the_same_shape_is_found_when_it_is_read(store: Path, tmp_path: Path) -> None:
    other = make_store(make_checkpoint(tmp_path / "other", seed=1), tmp_path / "other.q", SPEC)
    shutil.copy(other.directory / LAYER, store / LAYER)
    want = f"{store / LAYER}: the record of expert 0 (bytes "
    assert refusal(lambda: read_records(open_store(store))).startswith(want)


def test_a_store_half_written_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "s.partial").mkdir()
    want = f"{tmp_path}/s: unfinished; run the same `qmix quantize` again to continue"
    assert refusal(lambda: open_store(tmp_path / "s")) == want


def test_a_config_that_was_changed_is_refused(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    config = store.directory / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    with pytest.raises(StoreError, match=r"config\.json: changed since the store was made"):
        open_store(store.directory)
