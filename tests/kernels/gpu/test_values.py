"""Run the tests in `values`: in Triton's interpreter, which must be chosen before Triton loads, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "values").glob("test_*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def run_tests(file: Path, **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        str(file),
    ]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@each_file
def test_in_the_interpreter(file):
    run_tests(file, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_file
def test_on_a_gpu(file):
    run_tests(file, QMIX_TEST_GPU="1")
