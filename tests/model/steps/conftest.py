"""Tests here run captured steps: in Triton's interpreter, or on a GPU. They want a process of their own.

Triton decides when it is imported whether its functions are interpreted.
"""

from __future__ import annotations

import os

RUNS_KERNELS = "TRITON_INTERPRET" in os.environ or "QMIX_TEST_GPU" in os.environ
collect_ignore_glob = [] if RUNS_KERNELS else ["test_*.py"]
