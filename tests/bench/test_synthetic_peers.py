"""Comparisons of qmix with its peers: the memory limit, and the peers' model files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qmix.geometry import Geometry

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory_cap import CapError, memory_group
from synthetic import write_checkpoint
from synthetic_weights import SyntheticModel, to_float32

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL = SyntheticModel(Geometry(256, 512, 2, 4, 2, 64, 8, 2, 4096, 4096))
HOLD = "held = bytearray({}); print(len(held))"
MB = 10**6


@pytest.fixture
def can_limit():
    try:
        with memory_group(100 * MB, drop_cache=False):
            pass
    except (CapError, OSError) as error:
        pytest.skip(str(error))


def test_a_command_inside_its_limit_runs_and_is_measured(can_limit):
    with memory_group(100 * MB, drop_cache=False) as group:
        done = group.run([sys.executable, "-c", HOLD.format(40 * MB)], capture_output=True)
    assert (done.stdout, done.returncode) == (f"{40 * MB}\n", 0)


def test_page_cache_counts(can_limit, tmp_path):
    with memory_group(100 * MB, drop_cache=False) as group:
        group.run(["dd", "if=/dev/zero", f"of={tmp_path / 'file'}", "bs=1M", "count=30"], stderr=subprocess.DEVNULL)
        assert group.killed == 0
        assert group.peak is None or 30 * MB <= group.peak < 60 * MB


def test_a_command_beyond_its_limit_is_killed_and_the_group_removed(can_limit):
    with memory_group(50 * MB, drop_cache=False) as group:
        done = group.run([sys.executable, "-c", HOLD.format(80 * MB)], capture_output=True)
        assert done.returncode == -9
        assert group.killed == 1
        group.run(["sh", "-c", "sleep 100 &"])
    assert not group.directory.exists()


def test_the_program_passes_on_output_and_status(can_limit):
    command = [sys.executable, BENCHMARKS / "memory_cap.py", "--keep-cache", "1GB", "sh", "-c", "echo answer; exit 3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("answer\n", 3)
    assert json.loads(done.stderr)["killed"] == 0


def test_without_root_the_message_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CapError, match="root"), memory_group(None):
        pass


def test_transformers_with_weights_on_disk_follows_the_tour(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", MODEL)
    prompt = MODEL.prompt(40, 20)
    options = ["--prompt", json.dumps(prompt), "--tokens", "5", "--ram", "6MB", "--offload", tmp_path]
    command = [sys.executable, BENCHMARKS / "transformers_peer.py", tmp_path / "checkpoint", *options]
    ran = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert ran["token_ids"] == MODEL.continuation(prompt, 5)
    assert ran["modules_on_disk"] > 0
    assert len(ran["decode_s"]) == 4


@pytest.fixture
def peer():
    return pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")


def test_a_gguf_holds_the_same_weights(peer, tmp_path):
    """Weights agree within half a step of Q4_0, an eighth of a block's largest weight; q has rows in rotary pairs."""
    from gguf_writer import write_gguf

    gguf, _ = peer
    write_gguf(tmp_path / "model.gguf", MODEL)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    found = gguf.dequantize(tensors["blk.1.ffn_down_exps.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    expected = to_float32(MODEL.rows("model.layers.1.block_sparse_moe.experts.7.w2.weight"))
    assert np.abs(found[7] - expected).max() < np.abs(expected).max() / 7
    query = to_float32(tensors["blk.0.attn_q.weight"].data.view(np.uint16)).reshape(4, 32, 2, 256)
    published = to_float32(MODEL.rows("model.layers.0.self_attn.q_proj.weight")).reshape(4, 2, 32, 256)
    assert np.array_equal(query, published.swapaxes(1, 2))


def test_llamacpp_follows_the_tour(peer, tmp_path):
    from gguf_writer import write_gguf
    from llamacpp_peer import run

    prompt = MODEL.prompt(40, 20)
    for dense in ("bf16", "q4_0"):
        write_gguf(tmp_path / dense, MODEL, dense=dense)
        ran = run(prompt, tmp_path / dense, tokens=30, context=64, threads=2, batch=512, repack=False, prompt="")
        assert ran["token_ids"] == MODEL.continuation(prompt, 30)
