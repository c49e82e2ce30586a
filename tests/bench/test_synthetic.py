"""Synthetic models have the documented greedy text and routing in every file format."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import reference_model
from stores import files_of, make_store

from qmix.engine.load import load
from qmix.geometry import Geometry
from qmix.store.manifest import MANIFEST
from qmix.store.opened import ORIGIN, open_store

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from synthetic import describe_routing, write_checkpoint
from synthetic_store import write_store
from synthetic_weights import PRESETS, SPECIAL_TOKENS, SyntheticModel, to_bf16, to_float32

SMALL = Geometry(256, 448, 4, 4, 2, 64, 8, 2, 4096, 4096)


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    return SyntheticModel(SMALL)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    write_checkpoint(directory, model)
    return directory


def test_bf16_is_rounded_to_the_nearest():
    values = torch.tensor([1.0, 1.0039, 1.00390625 + 1e-6, -3.14159, 0.0])
    assert np.array_equal(to_bf16(values.numpy()), values.bfloat16().view(torch.uint16).numpy())
    assert to_float32(np.array([0x3F80, 0xC000], np.uint16)).tolist() == [1.0, -2.0]


def test_the_tour_visits_every_ordinary_token_once(model):
    assert sorted(model.tour.tolist()) == list(range(SPECIAL_TOKENS, 4096))
    assert model.prompt(len(model.tour) - 1, 2) == [model.tour[-1], model.tour[0]]
    assert model.continuation(model.prompt(5, 3), 4) == model.prompt(8, 4)


def test_embeddings_differ_and_the_head_follows_the_tour(model):
    embeddings = model.rows("model.embed_tokens.weight")
    assert len(np.unique(embeddings, axis=0)) == 4096
    logits = to_float32(embeddings[model.tour]) @ to_float32(model.rows("lm_head.weight")).T
    assert np.array_equal(logits.argmax(axis=1), np.roll(model.tour, -1))


def test_rows_are_the_same_in_whatever_chunks(model):
    for name in ("experts.3.w1.weight", "experts.0.w2.weight", "self_attn.q_proj.weight", "gate.weight"):
        whole = next(key for key in model.shapes if key.startswith("model.layers.2") and key.endswith(name))
        rows = model.shapes[whole][0]
        cut = rows // 3
        parts = (model.rows(whole, 0, cut), model.rows(whole, cut, rows))
        assert np.array_equal(np.concatenate(parts), model.rows(whole))


def test_a_matrix_is_its_pattern_rolled():
    model = SyntheticModel(replace(SMALL, hidden_size=8192, intermediate_size=1088))
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    pattern, (down, right) = model.pattern("w1"), model.roll(name)
    assert len(pattern) == 512
    assert right
    rows = [0, 100, 600, 1087]
    expected = np.roll(pattern, -right, axis=1)[(np.array(rows) + down) % 512]
    assert np.array_equal(model.rows(name)[rows], expected)


def test_all_experts_differ():
    model = SyntheticModel(PRESETS["8x7b"])
    for matrix in ("w1", "w3", "w2"):
        names = [name for name in model.shapes if name.endswith(f".{matrix}.weight")]
        assert len({model.roll(name) for name in names}) == len(names) == 256


@pytest.mark.parametrize("layers", [12, 32])
def test_consecutive_tokens_share_experts_as_mixtrals_do(layers):
    """Mixtral of Experts, table 5: layers 0, 15 and 31 of 32."""
    geometry = replace(PRESETS["8x7b"], num_layers=layers, hidden_size=1024, vocab_size=8192)
    measured = describe_routing(SyntheticModel(geometry))
    shares = measured["shared_experts"]
    assert 0.45 <= shares[0] <= 0.50
    assert 0.62 <= np.mean(shares[layers // 4 + 1 : 3 * layers // 4]) <= 0.67
    assert 0.62 <= shares[layers // 2] <= 0.67
    assert 0.44 <= shares[-1] <= 0.54
    low, high = measured["expert_use"]
    assert 0.7 < low < high < 1.3


def test_layers_move_the_hidden_state_by_about_an_eighth(model, checkpoint):
    reference = reference_model(checkpoint)
    with torch.inference_mode():
        states = reference.model(torch.tensor([model.prompt(40, 24)]), output_hidden_states=True).hidden_states
    before_last = (states[-2] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
    assert 0.08 < before_last.mean() < 0.15


def test_transformers_follows_the_tour_and_the_predicted_routing(model, checkpoint):
    reference, ids = reference_model(checkpoint), model.prompt(300, 64)
    chosen = {}
    for layer, block in enumerate(reference.model.layers):

        def note(module, inputs, output, layer=layer):
            chosen[layer] = inputs[0].reshape(-1, 256) @ module.weight.T

        block.mlp.gate.register_forward_hook(note)
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    assert logits.argmax(dim=-1).tolist() == model.prompt(301, 64)
    for layer, scores in chosen.items():
        got, expected = scores.topk(2).indices.numpy(), model.routing(layer, ids)
        assert np.mean(np.sort(got) == np.sort(expected)) > 0.85


@pytest.mark.slow
def test_qmix_follows_the_tour_in_every_precision(model, tmp_path):
    for precision in ("nf4", "int8"):
        store = write_store(tmp_path / precision, model, precision)
        ids = SyntheticModel.of(store.directory).prompt(700, 40)
        with load(store.directory, ram="2GiB", context=256) as runner:
            result = runner.complete(ids, temperature=0, max_new_tokens=100, ignore_eos=True)
        assert result.token_ids == model.continuation(ids, 100)


@pytest.mark.parametrize("precision", ["nf4", "half", "int8,1.*=fp4,*.3=nf4"])
def test_the_store_is_what_quantize_writes_of_the_checkpoint(model, checkpoint, precision, tmp_path):
    assert_same_store(make_store(checkpoint, tmp_path / "quantized", precision).directory, model, precision, tmp_path)


def test_a_shape_that_no_kernel_takes_is_written_alike(tmp_path):
    model = SyntheticModel(replace(SMALL, hidden_size=72, intermediate_size=100, num_layers=2))
    write_checkpoint(tmp_path / "checkpoint", model)
    assert_same_store(make_store(tmp_path / "checkpoint", tmp_path / "quantized").directory, model, "nf4", tmp_path)


def test_layers_with_the_same_experts_are_hard_links(tmp_path):
    model = SyntheticModel(SMALL, distinct_layers=3)
    write_checkpoint(tmp_path / "checkpoint", model)
    assert_same_store(make_store(tmp_path / "checkpoint", tmp_path / "quantized").directory, model, "nf4", tmp_path)
    files = [(tmp_path / "direct" / f"experts-0000{layer}.safetensors").stat().st_ino for layer in range(4)]
    assert files[3] == files[0]
    assert len(set(files)) == 3
    checksums = open_store(tmp_path / "direct").record_checksums
    assert checksums[3] == checksums[0] != checksums[1]


def assert_same_store(quantized: Path, model: SyntheticModel, precision: str, tmp_path: Path) -> None:
    """Assert equal bytes, except for the description of the source."""
    write_store(tmp_path / "direct", model, precision)
    ours, theirs = files_of(tmp_path / "direct"), files_of(quantized)
    del theirs[ORIGIN]
    manifests = [json.loads(files.pop(MANIFEST)) for files in (ours, theirs)]
    for manifest in manifests:
        del manifest["source"], manifest["digest"]
    assert manifests[0] == manifests[1]
    assert ours == theirs
