"""From the hub into a store: shards fetched one by one, used, and evicted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint
from command import LIMIT_SECONDS
from hub_server import HubServer

from qmix.store.opened import open_store


def run_qmix(*arguments: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
    }
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)


def stored_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.safetensors")}


@pytest.fixture
def hub(tmp_path):
    make_checkpoint(tmp_path / "mix", shards=4, intermediate_size=512)
    with HubServer(tmp_path / "mix") as server:
        yield server


def test_evicting_leaves_a_store_and_nothing_else(hub, tmp_path):
    local = run_qmix("quantize", str(tmp_path / "mix"), str(tmp_path / "local"), home=tmp_path, endpoint=hub.url)
    assert local.returncode == 0, local.stderr
    made = run_qmix("quantize", "org/mix", str(tmp_path / "store"), "--evict", home=tmp_path, endpoint=hub.url)
    assert made.returncode == 0, made.stderr
    assert stored_bytes(tmp_path / "store") == stored_bytes(tmp_path / "local")
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert not list(tmp_path.glob("store.partial*"))
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        path.name for path in (tmp_path / "local").iterdir()
    }


def test_without_evict_shards_stay_in_the_shared_cache_and_are_not_fetched_again(hub, tmp_path):
    assert run_qmix("quantize", "org/mix", str(tmp_path / "a"), home=tmp_path, endpoint=hub.url).returncode == 0
    assert len(list((tmp_path / "hf").rglob("snapshots/*/*.safetensors"))) == 4
    hub.forget()
    again = run_qmix("quantize", "org/mix", str(tmp_path / "b"), "--precision", "int8", home=tmp_path, endpoint=hub.url)
    assert again.returncode == 0, again.stderr
    assert not [name for name in (f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)) if hub.gets(name)]


def test_a_broken_off_run_fetches_only_the_shards_that_it_still_needs(hub, tmp_path):
    third = "model-00003-of-00004.safetensors"
    broken = hub.fault(f"*{third}", flip_at=200_000, times=1000)  # behind what the headers' look-up reads
    failed = run_qmix("quantize", "org/mix", str(tmp_path / "store"), "--evict", home=tmp_path, endpoint=hub.url)
    assert failed.returncode == 1
    assert third in failed.stderr
    assert len(failed.stderr.strip().splitlines()[-1]) < 400
    assert not (tmp_path / "store").exists()
    hub.faults.remove(broken)
    hub.forget()
    resumed = run_qmix("quantize", "org/mix", str(tmp_path / "store"), "--evict", home=tmp_path, endpoint=hub.url)
    assert resumed.returncode == 0, resumed.stderr
    assert hub.gets(third)
    first = hub.gets("model-00001-of-00004.safetensors")
    assert sum(request.sent for request in first) <= 100_100  # its header again, not its weights
    open_store(tmp_path / "store")


def test_a_plan_of_a_hub_model_reads_headers_only(measured, hub, tmp_path):
    planned = run_qmix("plan", "org/mix", "--json", home=tmp_path, endpoint=hub.url)
    assert planned.returncode == 0, planned.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    weights = [f"model-{index:05d}-of-00004.safetensors" for index in range(1, 5)]
    assert all(0 < sum(request.sent for request in hub.gets(name)) <= 100_100 for name in weights)


def test_pull_says_what_it_takes_and_leaves_the_store_alone(measured, tiny, tmp_path):
    write_checkpoint(tmp_path / "mix", random_weights(TINY_CONFIG), TINY_CONFIG, 3, tokenizer=tiny)
    with HubServer(tmp_path / "mix") as hub:
        made = run_qmix("pull", "org/mix", "--ram", "1GiB", home=tmp_path, endpoint=hub.url)
        assert made.returncode == 0, made.stderr
        told = made.stderr.splitlines()
        assert any(
            re.match(r"org/mix: [\d.]+ \w+ to fetch, the store takes [\d.]+ \w+ \(experts in nf4", line)
            for line in told
        )
        assert any(line.startswith("disk: ") for line in told)
        assert any(line.startswith("here: ") for line in told)
        assert told[-1].endswith("run it with `qmix chat org/mix`")
        assert not list((tmp_path / "hf").rglob("*.safetensors"))
        (store,) = measured.glob("org--mix-nf4-half-*")
        assert open_store(store).source_name == "mix"
        again = run_qmix("pull", "org/mix", "--ram", "1GiB", home=tmp_path, endpoint=hub.url)
        assert again.returncode == 0, again.stderr
        assert ": already there, " in again.stderr
        small = ("--precision", "int8", "--ram", "100MiB")
        assert run_qmix("pull", "org/mix", *small, home=tmp_path, endpoint=hub.url).returncode == 3
    listed = run_qmix("ls", "--json", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert "org/mix" in listed.stdout
