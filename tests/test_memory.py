"""Budgets against what processes really take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import LIMIT_SECONDS
from stores import make_store

PROMPT = "To install a package on this system, open a terminal and type the name. " * 40


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("memory") / "store")


def qmix_json(*arguments: str, prefix: tuple[str, ...] = ()) -> dict:
    command = [*prefix, sys.executable, "-m", "cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("mixed") / "store", "nf4,*.7=int8,2.*=half")


@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("store", ("--ram", "4GiB", "--context", "2048")),
        ("store", ("--ram", "4GiB", "--context", "1024", "--attn", "eager")),
        ("store", ("--ram", "{smallest}", "--context", "1024")),
        ("mixed", ("--ram", "4GiB", "--context", "1024")),
        ("mixed", ("--ram", "{smallest}", "--context", "1024")),
    ],
    ids=["roomy", "eager attention", "smallest pool", "mixed", "mixed, smallest pool"],
)
def test_the_plans_total_is_the_runs_peak(which, options, request):
    """Within 5%, and never above the budget."""
    store = request.getfixturevalue(which)
    if "{smallest}" in options:
        planned = qmix_json("plan", str(store.directory), "--ram", "4GiB", *options[2:])
        options = ("--ram", str(planned["smallest"]), *options[2:])
    planned = qmix_json("plan", str(store.directory), *options)
    ran = qmix_json("generate", PROMPT, "-m", str(store.directory), *options, "--max-new-tokens", "30", "--ignore-eos")
    peak = ran["memory"]["peak_memory"]
    assert peak == pytest.approx(planned["total"], rel=0.05)
    assert peak <= planned["ram"]


def test_a_short_runs_peak_is_the_plans_too(tiny, tmp_path):
    """Pool and cache are taken at once, not as they are first used: here a pool of half of 132 MB of experts."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 3, "num_local_experts": 8}
    config = TINY_CONFIG | sizes | {"vocab_size": 4096}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_weights(config), config, tokenizer=tiny)
    store = str(make_store(checkpoint, tmp_path / "store", "half").directory)
    whole = qmix_json("plan", store, "--ram", "4GiB")
    ram = ("--ram", str(whole["smallest"] + whole["pool"] // 2))
    planned = qmix_json("plan", store, *ram)
    assert 10 <= planned["slots"] <= 14
    ran = qmix_json("generate", "Hello", "-m", store, *ram, "--max-new-tokens", "1")
    assert ran["memory"]["peak_memory"] == pytest.approx(planned["total"], rel=0.05)


@pytest.fixture
def cgroup_of():
    """Gives the command prefix that runs a command with its memory, page cache included, held to some bytes."""
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" if (root / "memory").is_dir() else root
    group = parent / f"qmix-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no permission to make a cgroup")

    def prefix(limit: int) -> tuple[str, ...]:
        name = "memory.limit_in_bytes" if parent != root else "memory.max"
        if not (group / name).exists():
            pytest.skip("no memory controller")
        (group / name).write_text(str(limit))
        return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")

    yield prefix
    group.rmdir()


def test_a_run_completes_under_a_hard_limit_of_its_budget(store, cgroup_of):
    planned = qmix_json("plan", str(store.directory), "--ram", "4GiB", "--context", "1024")
    smallest = planned["smallest"]
    ran = qmix_json(
        *("generate", PROMPT, "-m", str(store.directory), "--ram", str(smallest), "--context", "1024"),
        *("--max-new-tokens", "30", "--ignore-eos", "--temperature", "0"),
        prefix=cgroup_of(smallest),
    )
    assert ran["usage"]["completion_tokens"] == 30
    assert ran["cache"]["misses"] > 0
