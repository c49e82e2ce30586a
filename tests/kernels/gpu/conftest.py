"""Tests in `values` run the kernels: in Triton's interpreter, or on a GPU. Each wants a process of its own."""

from __future__ import annotations

import os

RUNS_KERNELS = "TRITON_INTERPRET" in os.environ or "QMIX_TEST_GPU" in os.environ
collect_ignore = [] if RUNS_KERNELS else ["values"]
