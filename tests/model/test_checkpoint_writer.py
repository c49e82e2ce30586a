"""Checkpoints written by `save_pretrained`: every weight, opened by transformers and by qmix, whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, reference_model
from safetensors.torch import load_file
from stores import make_model, make_store

from qmix.checkpoint.naming import expert_key
from qmix.errors import QmixError, UsageError
from qmix.geometry import MATRICES
from qmix.precision.matmul import SLOW_PATH_WEIGHTS, HalfMatrix

MIXED = "nf4,*.1=int8,*.2=half,*.3=fp4"
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))


def made(directory: Path, precision: str = MIXED, slots: int | None = 2, **changes):
    """A model over a store of a random checkpoint; with `slots` for so many experts of each size."""
    return make_model(
        make_store(make_checkpoint(directory / "checkpoint", **changes), directory / "store", precision), slots
    )


def weights_in(directory: Path) -> dict[str, torch.Tensor] | None:
    """All weights of a directory that looks like a whole checkpoint; None of one that does not."""
    if not (directory / "config.json").is_file():
        return None
    json.loads((directory / "config.json").read_text())
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(directory / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(directory / file) for file in set(where.values())}
    return {name: shards[file][name] for name, file in where.items()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_store_in_half_precision_gives_the_published_weights_back(tmp_path, dtype):
    made(tmp_path, "half", dtype=dtype).save_pretrained(tmp_path / "out")
    assert same(weights_in(tmp_path / "out"), random_weights(TINY_CONFIG, dtype=dtype))


def test_quantised_experts_are_written_as_their_records_say(tmp_path):
    model = made(tmp_path)
    model.save_pretrained(tmp_path / "out")
    found = weights_in(tmp_path / "out")
    for layer in range(2):
        for number, expert in model.pool.get(layer, range(4)):
            for name, matrix in zip(MATRICES, (expert.gate, expert.up, expert.down), strict=True):
                whole = matrix.dequantize(0, matrix.rows).bfloat16()
                assert torch.equal(found[expert_key(layer, number, name)], whole)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"hidden_size": 65, "intermediate_size": 31}])
def test_transformers_opens_what_was_saved_and_computes_the_same(tmp_path, changes):
    model = made(tmp_path, **changes)
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    exact, theirs = reference_model(tmp_path / "out"), reference_model(tmp_path / "out", torch.bfloat16)
    with torch.no_grad():
        want = exact(IDS).logits
        rounding = (theirs(IDS).logits.float() - want).pow(2).mean(-1).sqrt().median()
        assert (model(IDS).logits.float() - want).pow(2).mean(-1).sqrt().median() < 1.5 * rounding
    saved = theirs.config.to_diff_dict()
    assert saved.pop("architectures") == ["MixtralForCausalLM"]
    assert saved == model.config.to_diff_dict()


def test_qmix_makes_a_store_of_what_was_saved(tmp_path):
    model = made(tmp_path)
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    again = make_model(make_store(tmp_path / "out", tmp_path / "again", "half"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0.05, atol=0.05)


def test_shards_are_no_larger_than_asked_for_and_stale_ones_go(tmp_path):
    model, out = made(tmp_path), tmp_path / "out"
    model.save_pretrained(out, max_shard_size=40_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 10
    assert max(sum(each.nbytes for each in load_file(shard).values()) for shard in shards) <= 40_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()
    whole = weights_in(out)
    (out / "model-00001-of-00002.safetensors.partial").write_bytes(b"of a run that was killed")
    (out / "notes.txt").write_text("mine")
    model.save_pretrained(out)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "notes.txt",
    }
    assert same(weights_in(out), whole)


def test_dense_weights_are_saved_as_they_are_now(tmp_path):
    model = made(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        model.model.layers[1].mlp.gate.weight.add_(1)
    model.save_pretrained(tmp_path / "out")
    found = weights_in(tmp_path / "out")
    assert torch.equal(found["model.norm.weight"], model.model.norm.weight)
    assert torch.equal(found["model.layers.1.block_sparse_moe.gate.weight"], model.model.layers[1].mlp.gate.weight)


def test_a_matrix_is_dequantised_a_few_rows_at_a_time():
    matrix = HalfMatrix(torch.randn(3000, 1500).bfloat16(), 3000, 1500)
    pieces = list(matrix.pieces(torch.bfloat16))
    assert max(piece.numel() for piece in pieces) <= SLOW_PATH_WEIGHTS
    assert torch.equal(torch.cat(pieces), matrix.weight)
    assert torch.equal(matrix.dense(torch.bfloat16), matrix.weight)


def test_stopped_at_any_file_operation_it_leaves_the_old_checkpoint_the_new_one_or_none(tmp_path):
    """At each operation that Python's audit tells of: files opened, renamed, removed."""
    old, new = made(tmp_path / "a", "half", None), made(tmp_path / "b", "nf4", None)
    old.save_pretrained(tmp_path / "old", max_shard_size="200KB")
    new.save_pretrained(tmp_path / "new", max_shard_size="150KB")
    wholes = [weights_in(tmp_path / "old"), weights_in(tmp_path / "new")]
    left, watch = [], Watch()
    for operation in range(1, 200):
        out = tmp_path / f"out{operation}"
        old.save_pretrained(out, max_shard_size="200KB")
        ended = saved_and_stopped(new, out, watch, operation)
        found = weights_in(out)
        left.append(None if found is None else next(i for i, whole in enumerate(wholes) if same(found, whole)))
        if ended:
            break
    assert ended
    assert left == sorted(left, key=[0, None, 1].index)
    assert set(left) == {0, None, 1}


class Stopped(BaseException):
    """As a kill, nobody handles it."""


class Watch:
    """Raises Stopped in place of the nth operation on a file; from then on it lets everything pass."""

    def __init__(self) -> None:
        self.left = 0
        sys.addaudithook(self)  # for the life of the process

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.left and event in ("open", "os.rename", "os.remove", "os.mkdir"):
            self.left -= 1
            if not self.left:
                raise Stopped


def saved_and_stopped(model, directory: Path, watch: Watch, operation: int) -> bool:
    """Save, and stop instead of the nth operation on a file; whether it came to its end before."""
    watch.left = operation
    try:
        model.save_pretrained(directory, max_shard_size="150KB")
    except Stopped:
        return False
    watch.left = 0
    return True


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    model = made(tmp_path)
    (tmp_path / "file").write_text("")
    out, store = tmp_path / "out", tmp_path / "store"
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    for directory, options, says in (
        (store, {}, "is a store; give another directory"),
        (tmp_path / "file", {}, "is a file; give another directory"),
        (out, {"max_shard_size": "much"}, "is not a size"),
        (out, {"state_dict": {}}, "state_dict"),
        (out, {"push_to_hub": True}, "hf upload"),
        (out, {"variant": "fp16"}, "variant is not supported"),
        (out, {"distributed_checkpoint": True}, "distributed_checkpoint is not supported"),
    ):
        with pytest.raises(UsageError, match=says):
            model.save_pretrained(directory, **options)
    assert not out.exists()
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    with pytest.raises(QmixError, match="while writing the checkpoint"):
        model.save_pretrained(tmp_path / "file" / "below")


@pytest.mark.parametrize("spoil", ["a parameter more", "another shape"])
def test_parameters_that_are_not_the_stores_are_not_saved(tmp_path, spoil):
    model = made(tmp_path)
    if spoil == "another shape":
        model.lm_head = torch.nn.Linear(64, 97, bias=False, dtype=torch.bfloat16)
    else:
        model.model.layers[0].self_attn.q_proj.lora = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match="not those of its store"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_transformers_would_refuse_is_refused_first(tmp_path):
    model = made(tmp_path)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with pytest.raises(UsageError, match=r"model\.generation_config"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
