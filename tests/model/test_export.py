"""`qmix export`: a store written as a checkpoint, from its files alone."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_store
from transformers import AutoModelForCausalLM, AutoTokenizer

import qmix as library
from qmix.errors import StoreError
from qmix.model import checkpoint_writer
from qmix.model.checkpoint_writer import export_store
from qmix.pool.experts import ExpertPool

MIXED = "nf4,*.1=int8,*.2=half,*.3=fp4"


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"hidden_size": 65, "intermediate_size": 31}, {"dtype": torch.float16}],
)
def test_it_is_what_the_loaded_model_saves(tmp_path, changes):
    store = make_store(make_checkpoint(tmp_path / "checkpoint", **changes), tmp_path / "store", MIXED)
    make_model(store).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    sizes = export_store(store, tmp_path / "exported", "100KB")
    files = sorted(path.name for path in (tmp_path / "saved").glob("model*"))
    assert sorted(sizes) == [name for name in files if name.endswith(".safetensors")]
    for name in files:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_transformers_loads_it_and_continues_as_the_store_does(qmix, tiny, tmp_path):
    store = make_store(tiny, tmp_path / "store")
    assert qmix("export", "nothing", tmp_path / "out").status == 2
    assert qmix("export", "tiny", tmp_path / "by name").status == 0
    done = qmix("export", store.directory, tmp_path / "out", "--max-shard-size", "1MB")
    assert (done.status, done.out) == (0, ""), done.err
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert done.lines[-1].startswith(f"{tmp_path / 'out'}: ")
    assert done.lines[-1].endswith(f" of weights in {len(sizes)} files")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    ids = tokenizer("To install a package, open the package manager", return_tensors="pt").input_ids
    with library.load(store.directory, ram="1GiB") as runner, torch.no_grad():
        ours, theirs = (each(ids).logits[0].float().log_softmax(-1) for each in (runner.model, model))
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert 0 <= kl < 5e-3  # weights are rounded once more; nf4 itself is five times as far from the checkpoint
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_few_records_are_in_memory_at_a_time(tmp_path, monkeypatch):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", MIXED)
    slots = []

    class Watched(ExpertPool):
        def __init__(self, store, counts):
            slots.append(sum(counts.values()))
            super().__init__(store, counts)

    monkeypatch.setattr(checkpoint_writer, "ExpertPool", Watched)
    export_store(store, tmp_path / "out", "5GB")
    assert slots == [2 * len(store.layout.record_counts)]


@pytest.mark.parametrize("part", ["dense", "experts-00001"])
def test_a_damaged_store_gives_no_checkpoint(tmp_path, part):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    file = store.directory / f"{part}.safetensors"
    data = bytearray(file.read_bytes())
    data[-4096 - 100] ^= 255
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged; repair it with"):
        export_store(store, tmp_path / "out", "5GB")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
