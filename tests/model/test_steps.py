"""Run the tests in `steps`: in Triton's interpreter, which must be chosen before Triton loads, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent / "steps"


def run_tests(*options: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    command += [str(HERE), *options]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_in_the_interpreter():
    run_tests("-m", "not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_more_plans_in_the_interpreter():
    run_tests("-m", "slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_on_gpus():
    """On a single GPU without the plans of two."""
    run_tests(*([] if torch.cuda.device_count() > 1 else ["-k", "not two and not each_other"]), QMIX_TEST_GPU="1")
