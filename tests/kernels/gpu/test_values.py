"""Run the tests in `values`: in Triton's interpreter, which must be chosen before Triton loads, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
VALUES = Path(__file__).parent / "values"
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # tiles are small


def run_tests(**environment: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore:All-NaN", f"--confcutdir={VALUES}"]
    command = [sys.executable, "-m", "pytest", *options, str(VALUES)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_in_the_interpreter():
    run_tests(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", **ALONE, **ONE_THREAD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    run_tests(**ALONE)
