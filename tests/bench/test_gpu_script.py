"""The script that measures on a GPU, without one: its refusal, its choice of cases, its watch, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from synthetic_store import write_store
from synthetic_weights import SyntheticModel

from qmix.geometry import Geometry

GIB = 2**30


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, gpu.__file__, str(tmp_path / "there")]
    bare = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=bare, check=False)
    assert done.returncode == 1
    assert "Error: needs an NVIDIA GPU with its driver, and torch for CUDA" in done.stderr
    assert not (tmp_path / "there").exists()


def test_what_is_run_follows_from_the_memory():
    def names(*arguments):
        return [case.name for case in gpu.cases(gpu.BUDGETS, *arguments)]

    small = ["8x7b, 12GiB", "8x7b, CPU alone"]
    assert names(12 * GIB, 128 * GIB, True) == small
    assert names(79 * GIB, 128 * GIB, True) == [
        "8x7b, 40GiB", "8x7b, 24GiB", "8x7b, 12GiB", "8x22b, 24GiB", "8x7b, CPU alone"
    ]  # fmt: skip
    assert "8x22b, 24GiB" not in names(79 * GIB, 64 * GIB, True) + names(79 * GIB, 128 * GIB, False)
    assert gpu.Case("8x7b", None).options == ["--gpu", "none"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program in nvidia-smi's place that prints the MiB in a file."""
    used = tmp_path / "used"
    used.write_text("500\n")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {used}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return used


def test_the_peak_is_above_what_was_in_use_before(nvidia_smi, monkeypatch):
    monkeypatch.setattr(gpu, "WATCH_SECONDS", 0.01)
    with gpu.Peak() as peak:
        nvidia_smi.write_text("12500\n")
        until = time.monotonic() + 10
        while peak.nbytes != 12000 * 2**20 and time.monotonic() < until:
            time.sleep(0.01)
        nvidia_smi.write_text("600\n")
    assert peak.nbytes == 12000 * 2**20


@pytest.mark.slow
def test_the_cpus_case_of_a_small_store_runs_and_fills_a_row(tmp_path, monkeypatch):
    """Everything but the GPU: plan, bench, the known text, and the table."""
    store = write_store(tmp_path / "small", SyntheticModel(Geometry(256, 448, 4, 4, 2, 64, 8, 2, 4096, 4096)))
    monkeypatch.setattr(gpu, "PROMPT", 24)
    monkeypatch.setattr(gpu, "NEW", 4)
    case = gpu.Case("small", None)
    found = gpu.measured(case, store.directory, tmp_path / "state", 120)
    assert found["right"] == gpu.TEXT
    assert found["peak"] is None
    cells = gpu.row(case, found)
    assert cells[0] == "small, CPU alone"
    assert float(cells[1]) == pytest.approx(
        next(r["rate"] for r in found["report"]["rows"] if r["test"] == "tg4"), rel=1e-3
    )
    assert cells[-1] == f"{gpu.TEXT} of {gpu.TEXT}"
    shown = Console(width=200)
    with shown.capture() as capture:
        shown.print(gpu.table([cells]))
    assert "nvidia-smi's" in capture.get()
    assert json.dumps(found)


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"qmix plan nowhere: .*nowhere"):
        gpu.qmix("plan", "nowhere", state=tmp_path, limit=60)
