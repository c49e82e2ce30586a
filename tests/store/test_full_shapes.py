"""At the shapes of the published models; minutes, and gigabytes of disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def synthetic(directory: Path, **sizes: int) -> Path:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    subprocess.run([sys.executable, ROOT / "benchmarks" / "synthetic.py", directory, *options], check=True)
    return directory


@pytest.mark.parametrize("precision", ["nf4", "int8", "half"])
def test_quantizing_8x22b_experts_takes_at_most_400_mb(tmp_path, precision):
    checkpoint = synthetic(
        tmp_path / "checkpoint", layers=1, hidden=6144, intermediate=16384, experts=2, heads=48, vocabulary=32000
    )
    script = ROOT / "benchmarks" / "quantize_memory.py"
    command = [sys.executable, script, checkpoint, "--precision", precision]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 20e6 < measured["above_imports"] <= 400e6


def test_plans_hold_for_a_model_larger_than_its_budget(tmp_path):
    checkpoint = synthetic(tmp_path / "checkpoint", layers=4, hidden=2048, intermediate=7168, heads=16)
    store = str(tmp_path / "store")
    subprocess.run([sys.executable, "-m", "cli", "quantize", checkpoint, store], check=True)
    prompt = "To install a package on this system, open a terminal and type the name. " * 60
    texts = set()
    for ram in ("4GiB", "1300MB", "smallest"):
        planned = qmix_json("plan", store, "--ram", ram.replace("smallest", "4GiB"), "--context", "1536")
        if ram == "smallest":
            planned = qmix_json("plan", store, "--ram", str(planned["smallest"]), "--context", "1536")
        limits = ("--ram", str(planned["ram"]), "--context", "1536")
        greedy = ("--temperature", "0", "--max-new-tokens", "30", "--ignore-eos")
        ran = qmix_json("generate", prompt, "-m", store, *limits, *greedy)
        assert ran["memory"]["peak_memory"] == pytest.approx(planned["total"], rel=0.05)
        assert ran["memory"]["peak_memory"] <= planned["ram"]
        texts.add(ran["text"])
    assert len(texts) == 1


def qmix_json(*arguments: str) -> dict:
    command = [sys.executable, "-m", "cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
