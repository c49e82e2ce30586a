"""The layer-wise pass gives the numbers of transformers and of stores, and reads each weight once."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_store
from transformers import AutoModelForCausalLM

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.checkpoint_weights import CheckpointWeights
from qmix.engine.layerwise import Observer, run_layers
from qmix.engine.layerwise import logits as logits_of
from qmix.engine.passes import plain_pass
from qmix.engine.store_weights import PATH_ATTENTION, PathWeights
from qmix.engine.variants import Quantised, Stored
from qmix.errors import CheckpointError, StoreError
from qmix.model.build import build_model
from qmix.model.kv import kv_layers
from qmix.pool.experts import ExpertPool
from qmix.store.sources import layout_for

RNG = torch.Generator().manual_seed(0)
SEQUENCES = [torch.randint(3, 4000, (length,), generator=RNG).tolist() for length in (70, 1, 33, 600)]
EVERY = torch.arange(sum(map(len, SEQUENCES)))


def variant(checkpoint, spec: str, clip: bool = False) -> Quantised:
    layout = layout_for(checkpoint, spec, None, clip)
    return Quantised(spec, checkpoint.geometry, layout.precisions, layout.dtype, clip)


def logits(checkpoint, variants, sequences=SEQUENCES) -> list[torch.Tensor]:
    """Return each variant's logits after every token, [T, V]."""
    rows = torch.arange(sum(map(len, sequences)))
    with CheckpointWeights(checkpoint, checkpoint.half_dtype, variants) as weights:
        chunks = [scores for _, scores in logits_of(weights, run_layers(weights, plain_pass(sequences)), rows)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return open_checkpoint(LocalSource(tiny))


def test_half_is_as_close_to_fp32_as_transformers_bf16(checkpoint, tiny):
    (ours,) = logits(checkpoint, [variant(checkpoint, "half")])
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        with torch.inference_mode():
            found.append(torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in SEQUENCES]))
    theirs, exact = found
    assert (ours - exact).square().mean() <= 1.1 * (theirs - exact).square().mean()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize(
    ("spec", "clip"),
    [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False), ("half", False), ("nf4,0.*=int8,*.3=half", True)],
)
def test_a_variant_made_in_memory_is_the_store(checkpoint, tiny, tmp_path, spec, clip):
    store = make_store(tiny, tmp_path / "store", spec, clip=clip)
    made, stored = logits(checkpoint, [variant(checkpoint, spec, clip), Stored("store", store, checkpoint)])
    assert torch.equal(made, stored)
    assert variant(checkpoint, spec).nbytes == sum(store.layout.expert_bytes.values())


def test_a_store_gives_what_it_gives_as_a_model(checkpoint, tiny, tmp_path):
    store = make_store(tiny, tmp_path / "store", "int8")
    (layerwise,) = logits(checkpoint, [Stored("store", store, checkpoint)])
    model = make_model(store)
    with torch.inference_mode():
        whole = torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in SEQUENCES])
    assert (layerwise - whole).abs().mean() < 0.03  # a few tokens at once take other kernels, which round otherwise
    assert (layerwise.argmax(-1) == whole.argmax(-1)).float().mean() > 0.97


def test_a_variant_is_not_changed_by_those_beside_it(checkpoint):
    alone = logits(checkpoint, [variant(checkpoint, "nf4")])
    beside = logits(checkpoint, [variant(checkpoint, name) for name in ("half", "nf4", "int8")])
    assert torch.equal(alone[0], beside[1])


def test_sequences_do_not_see_each_other(checkpoint):
    (whole,) = logits(checkpoint, [variant(checkpoint, "half")])
    (last,) = logits(checkpoint, [variant(checkpoint, "half")], SEQUENCES[-1:])
    assert (whole[-len(SEQUENCES[-1]) :] - last).abs().mean() < 0.03


def test_every_weight_is_read_once(checkpoint, monkeypatch):
    read: Counter[str] = Counter()
    weight = CheckpointWeights.weight

    def counting(self, key):
        read[key] += 1
        return weight(self, key)

    monkeypatch.setattr(CheckpointWeights, "weight", counting)
    logits(checkpoint, [variant(checkpoint, "half"), variant(checkpoint, "nf4")])
    assert read == Counter(dict.fromkeys(checkpoint.weights, 1))


class Trace(Observer):
    """Keeps the experts of each layer, and the order of calls."""

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []
        self.calls: list[object] = []

    def embedded(self, stream):
        self.calls.append("embedded")

    def routed(self, layer, stream, states, routing):
        self.calls.append(layer)
        self.chosen.append(routing.chosen.sort().values)


def test_a_checkpoint_and_its_store_are_observed_alike(checkpoint, tiny, tmp_path):
    part, layers = plain_pass(SEQUENCES), checkpoint.geometry.num_layers
    ours, theirs, finished = Trace(), Trace(), []
    with CheckpointWeights(checkpoint, checkpoint.half_dtype, [variant(checkpoint, "half")]) as weights:
        run_layers(weights, part, [ours])
    store = make_store(tiny, tmp_path / "store", "half")
    with closing(ExpertPool(store, dict.fromkeys(store.layout.record_counts, 3), invariant=True)) as pool:
        model = build_model(store, pool, PATH_ATTENTION)
        longest = max(map(len, SEQUENCES))
        (path,) = kv_layers(store.geometry, 1, longest, HALF[store.layout.dtype], aligned=True)
        run_layers(PathWeights(model, path), part, [theirs], finished.append)
    assert ours.calls == theirs.calls == ["embedded", *range(layers)]
    assert finished == list(range(1, layers + 1))
    same = (torch.stack(ours.chosen) == torch.stack(theirs.chosen)).float().mean()
    assert same > 0.99  # the two round otherwise where experts are nearly as likely


def test_a_checkpoint_that_changes_during_a_pass_is_refused(tmp_path):
    directory = make_checkpoint(tmp_path / "model")
    opened = open_checkpoint(LocalSource(directory))
    weights = CheckpointWeights(opened, "bf16", [variant(opened, "half")])
    run_layers(weights, plain_pass([[1, 5, 9]]))
    os.utime(directory / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="changed"):
        weights.__exit__(None)


@pytest.mark.parametrize("form", ["tied", "fp32"])
def test_other_checkpoints(tmp_path, form):
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    directory = make_checkpoint(tmp_path / "model", dtype=dtype, tie_word_embeddings=form == "tied")
    opened = open_checkpoint(LocalSource(directory))
    ids = [[1, 5, 9, 60, 33, 2, 7]]
    (ours,) = logits(opened, [variant(opened, "half")], ids)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = model(torch.tensor(ids)).logits[0].float()
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_store_of_other_weights_is_refused(checkpoint, tmp_path):
    other = make_store(make_checkpoint(tmp_path / "model"), tmp_path / "store")
    with pytest.raises(StoreError, match="was made from other weights"):
        Stored("store", other, checkpoint)
