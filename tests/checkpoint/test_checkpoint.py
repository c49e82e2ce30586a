"""Every published format of the same weights gives the same store, and the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    TINY_CONFIG,
    make_checkpoint,
    random_weights,
    reference_model,
    write_checkpoint,
    write_first_release,
    write_fused,
    write_mistral,
)
from safetensors.torch import load_file, save_file
from stores import make_model, make_store
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.fingerprint import checkpoint_fingerprint
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.source import LocalSource
from qmix.errors import CheckpointError
from qmix.store.sources import open_source


def write_pickles(directory: Path, weights: dict, config: dict, **files: Callable[[str], bool]) -> Path:
    """PyTorch's own files, by name each with the weights that its function picks."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for name, picks in files.items():
        torch.save({key: weight for key, weight in weights.items() if picks(key)}, directory / name)
    return directory


def single_bin(directory: Path, weights: dict, config: dict) -> Path:
    return write_pickles(directory, weights, config, **{"pytorch_model.bin": lambda key: True})


def sharded_bin(directory: Path, weights: dict, config: dict) -> Path:
    halves = {
        "pytorch_model-00001-of-00002.bin": lambda key: "w1" in key,
        "pytorch_model-00002-of-00002.bin": lambda key: "w1" not in key,
    }
    return write_pickles(directory, weights, config, **halves)


def parameters_in_the_old_format(directory: Path, weights: dict, config: dict) -> Path:
    """As torch wrote before it used zip files, and with gradients wanted."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    torch.save(parameters, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return directory


def mistral_pth(directory: Path, weights: dict, config: dict) -> Path:
    write_mistral(directory, weights, config)
    released = directory / "consolidated.safetensors"
    torch.save(load_file(released), directory / "consolidated.00.pth")
    released.unlink()
    return directory


def first_release_pth(directory: Path, weights: dict, config: dict) -> Path:
    write_first_release(directory, weights, config)
    released = directory / "consolidated.safetensors"
    torch.save(load_file(released), directory / "consolidated.00.pth")
    released.unlink()
    return directory


def shards_without_an_index(directory: Path, weights: dict, config: dict) -> Path:
    write_checkpoint(directory, weights, config, shards=3)
    (directory / "model.safetensors.index.json").unlink()
    return directory


FORMATS = {
    "sharded": lambda *args: write_checkpoint(*args, shards=5),
    "shards without an index": shards_without_an_index,
    "fused": write_fused,
    "mistral": write_mistral,
    "mistral sharded": lambda *args: write_mistral(*args, shards=3),
    "mistral pth": mistral_pth,
    "first release": write_first_release,
    "first release pth": first_release_pth,
    "bin": single_bin,
    "bin sharded": sharded_bin,
    "old bin": parameters_in_the_old_format,
}


def payload(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.safetensors")}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_format_of_the_same_weights_gives_the_same_store(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    config = TINY_CONFIG | {"head_dim": 24, "num_local_experts": 3}
    weights = random_weights(config, dtype=dtype)
    single = write_checkpoint(tmp_path / "single", weights, config)
    other = FORMATS[form](tmp_path / "other", weights, config)
    spec = "nf4,0.*=half,1.0=int8"
    want = make_store(single, tmp_path / "want", spec)
    made = make_store(other, tmp_path / "made", spec)
    assert payload(made.directory) == payload(want.directory)
    assert made.record_checksums == want.record_checksums
    assert made.geometry.head_dim == 24


def test_both_formats_of_the_same_weights_give_the_same_logits(tmp_path: Path) -> None:
    weights = random_weights(TINY_CONFIG)
    ids = torch.arange(5, 29).view(2, 12)
    logits = []
    for write in (write_checkpoint, write_mistral):
        checkpoint = write(tmp_path / write.__name__, weights, TINY_CONFIG)
        store = make_store(checkpoint, tmp_path / f"{write.__name__}.q", "half")
        logits.append(make_model(store)(ids).logits)
    assert torch.equal(*logits)
    theirs = reference_model(tmp_path / "write_checkpoint")(ids).logits.detach()
    assert (logits[0] - theirs).abs().max() < 0.05 * theirs.std()


def test_q_and_k_rows_of_the_mistral_release_are_put_in_order_for_rotate_half(tmp_path: Path) -> None:
    """Scores of the release's own rotary, complex products of neighbouring rows, are those of transformers'."""
    config = TINY_CONFIG | {"num_key_value_heads": 4}
    checkpoint = open_checkpoint(LocalSource(write_mistral(tmp_path / "m", random_weights(config), config)))
    released = load_file(tmp_path / "m" / "consolidated.safetensors")
    x, heads, head = torch.randn(7, 64), 4, 16
    angles = torch.outer(torch.arange(7.0), 1e4 ** -(torch.arange(0, head, 2) / head))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, head / 2]
    rotated, ours = [], []
    with WeightFile(tmp_path / "m" / "consolidated.safetensors") as file:
        for name in "qk":
            theirs = (x @ released[f"layers.1.attention.w{name}.weight"].float().T).view(7, heads, head)
            pairs = torch.view_as_complex(theirs.reshape(7, heads, -1, 2))
            rotated.append(torch.view_as_real(pairs * turn).flatten(2))
            weight = checkpoint.weights[f"model.layers.1.self_attn.{name}_proj.weight"]
            rows = torch.cat([file.rows(weight, start, start + 32, head) for start in (0, 32)])
            ours.append((x @ rows.float().T).view(1, 7, heads, head).transpose(1, 2))
    from transformers import MixtralConfig

    cos, sin = MixtralRotaryEmbedding(MixtralConfig(**config))(x[None], torch.arange(7)[None])
    q, k = apply_rotary_pos_emb(*ours, cos, sin)
    scores = torch.einsum("thd,shd->hts", *rotated)
    assert torch.allclose((q @ k.transpose(2, 3))[0], scores, atol=1e-4)


def test_weights_that_follow_from_the_config_are_skipped(tmp_path: Path) -> None:
    config = TINY_CONFIG | {"tie_word_embeddings": True}
    weights = random_weights(config)
    plain = make_store(write_checkpoint(tmp_path / "plain", weights, config), tmp_path / "plain.q")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    extra = make_store(write_checkpoint(tmp_path / "extra", weights | more, config), tmp_path / "extra.q")
    assert payload(extra.directory) == payload(plain.directory)
    assert "lm_head.weight" not in extra.layout.dense.tensors
    model = make_model(extra)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("write", [write_checkpoint, write_mistral])
@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_is_there_is_used_whatever_the_flag_says(tmp_path: Path, write: Callable, own: bool) -> None:
    """As in transformers 5, which ties no two tensors that differ; a copy of the embeddings gives the same numbers."""
    tied, ids = TINY_CONFIG | {"tie_word_embeddings": True}, torch.arange(5, 29).view(2, 12)
    weights = random_weights(TINY_CONFIG)
    if not own:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    directory = write(tmp_path / "m", weights, tied)
    if write is write_mistral:
        params = json.loads((directory / "params.json").read_text()) | {"tied_embeddings": True}
        (directory / "params.json").write_text(json.dumps(params))
    store = make_store(directory, tmp_path / "q", "half")
    assert store.config["tie_word_embeddings"] is False
    assert not store.geometry.tie_embeddings
    theirs = reference_model(write_checkpoint(tmp_path / "theirs", weights, tied))(ids).logits.detach()
    assert (make_model(store)(ids).logits - theirs).abs().max() < 0.05 * theirs.std()


def left_over_index(directory: Path, weights: dict, config: dict) -> Path:
    """Write the index of 19 shards that were joined since."""
    write_checkpoint(directory, weights, config)
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00019.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def index_of_other_shards(directory: Path, weights: dict, config: dict) -> Path:
    write_checkpoint(directory, weights, config, shards=2)
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00019.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def index_of_pickles_that_are_gone(directory: Path, weights: dict, config: dict) -> Path:
    write_checkpoint(directory, weights, config)
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00019.bin")}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("write", [left_over_index, index_of_other_shards, index_of_pickles_that_are_gone])
def test_an_index_of_shards_that_are_gone_is_left_aside(tmp_path: Path, write: Callable) -> None:
    weights = random_weights(TINY_CONFIG)
    opened = open_checkpoint(LocalSource(write(tmp_path / "m", weights, TINY_CONFIG)))
    assert set(opened.weights) == set(weights)
    assert opened.files == sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))


@pytest.mark.parametrize("refs", [True, False])
def test_a_folder_of_the_hubs_cache_stands_for_its_snapshot(tmp_path: Path, refs: bool) -> None:
    folder = tmp_path / "models--org--mix"
    make_checkpoint(folder / "blobs-elsewhere")
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in (folder / "blobs-elsewhere").iterdir():
        (snapshot / path.name).symlink_to(path)
    if refs:
        (folder / "snapshots" / "older").mkdir()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123abc")
    assert open_checkpoint(open_source(folder)).source.name == str(snapshot)


def test_of_several_snapshots_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "models--org--mix" / "snapshots" / name).mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"models--org--mix: a folder of the Hub cache .*give one of .*/snapshots"
    ):
        open_source(tmp_path / "models--org--mix")


@pytest.mark.parametrize("shards", [1, 4])
def test_a_fingerprint_follows_the_weights_and_not_the_place(tmp_path: Path, shards: int) -> None:
    first = make_checkpoint(tmp_path / "first", shards=shards)
    shutil.copytree(first, tmp_path / "elsewhere" / "copy")
    shutil.copytree(first, tmp_path / "changed")
    name = max(path.name for path in (tmp_path / "changed").glob("*.safetensors"))
    weights = load_file(tmp_path / "changed" / name)
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, tmp_path / "changed" / name)
    other_config = make_checkpoint(tmp_path / "config", shards=shards, rms_norm_eps=1e-6)
    other_seed = make_checkpoint(tmp_path / "seed", shards=shards, seed=1)
    places = [first, tmp_path / "elsewhere" / "copy", tmp_path / "changed", other_config, other_seed]
    prints = [checkpoint_fingerprint(open_checkpoint(LocalSource(place))) for place in places]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
